"""What a person sees: tables, lists and progress bars, out of plain facts."""
