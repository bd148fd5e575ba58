"""Makes PEFT know the method QAA, through the private tables that PEFT has no public door to.

Modules import in one direction: ``peft_type`` <- ``config`` <- ``model`` <- here.
"""

from __future__ import annotations

import peft
from peft.utils.peft_types import PeftType

from qaa_serve.training.config import QAAConfig
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.model import QAAModel
from qaa_serve.training.peft_type import qaa_type


def register() -> PeftType:
    """Add QAA to PEFT's methods, once; later calls do nothing.

    Returns:
        The member ``PeftType.QAA``.

    Raises:
        TrainingError: for a PEFT whose tables are not known to be the same, or that has another QAA.
    """
    member = qaa_type()
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import register_peft_method

        if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(name="qaa", config_cls=QAAConfig, model_cls=QAAModel)
        registered = PEFT_TYPE_TO_CONFIG_MAPPING[member]
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"QAA could not be entered into the tables of peft {peft.__version__}: {error}"
        ) from error
    if registered is not QAAConfig:
        raise TrainingError(
            f"PEFT's method QAA belongs to {registered.__module__}.{registered.__qualname__} already: "
            "do not import that package together with this one"
        )
    return member
