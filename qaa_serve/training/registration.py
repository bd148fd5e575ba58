"""Makes PEFT know the method QAA, through the private tables that PEFT has no public door to."""

from __future__ import annotations

import peft
from packaging.version import Version
from peft.utils.peft_types import PeftType

from qaa_serve.training.errors import TrainingError

#: The versions of PEFT whose tables were read; pyproject.toml has the same bounds.
_PEFT_FROM, _PEFT_BELOW = Version("0.21"), Version("0.22")


def register() -> PeftType:
    """Add QAA to PEFT's methods, once; later calls do nothing.

    Returns:
        The member ``PeftType.QAA``.

    Raises:
        TrainingError: for a PEFT whose tables are not known to be the same, or that has another QAA.
    """
    from qaa_serve.training.config import QAAConfig
    from qaa_serve.training.model import QAAModel

    found = Version(peft.__version__)
    if not _PEFT_FROM <= found < _PEFT_BELOW:
        raise TrainingError(
            f"peft {found} is installed; QAA enters private tables of PEFT that were checked for "
            f"peft>={_PEFT_FROM},<{_PEFT_BELOW}: install one of those"
        )
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import register_peft_method

        member = _enum_member("QAA")
        if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(name="qaa", config_cls=QAAConfig, model_cls=QAAModel)
        registered = PEFT_TYPE_TO_CONFIG_MAPPING[member]
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"QAA could not be entered into the tables of peft {found}: {error}") from error
    if registered is not QAAConfig:
        raise TrainingError(
            f"PEFT's method QAA belongs to {registered.__module__}.{registered.__qualname__} already: "
            "do not import that package together with this one"
        )
    return member


def _enum_member(name: str) -> PeftType:
    """The member of the enum, added if need be: Python keeps enums closed, PEFT keeps methods in one."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(PeftType)
        # Python < 3.12 finds members in the map, later ones as attributes of the class.
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    member = PeftType(name)
    if getattr(PeftType, name) is not member or member not in list(PeftType):
        raise TypeError(f"PeftType takes no new member {name} on this Python")
    return member
