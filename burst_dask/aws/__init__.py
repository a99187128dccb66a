"""Amazon Web Services: clients, what their errors mean, the stack that `burst setup aws` makes, and its image.

Nothing here knows sessions or commands; fleets on ECS and the commands are built on it.
"""
