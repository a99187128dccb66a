"""Workers as tasks of Amazon ECS."""

from burst_dask.fleet.ecs.fleet import EcsFleet
from burst_dask.fleet.ecs.launching import RoleNotKnownYet
from burst_dask.fleet.ecs.plan import EcsArguments, EcsPlan, price_note, price_of, settings_of

__all__ = ["EcsArguments", "EcsFleet", "EcsPlan", "RoleNotKnownYet", "price_note", "price_of", "settings_of"]
