"""The member ``QAA`` of PEFT's enum of methods."""

from __future__ import annotations

import peft
from packaging.version import Version
from peft.utils.peft_types import PeftType

from qaa_serve.training.errors import TrainingError

#: The versions of PEFT whose tables were read; pyproject.toml has the same bounds.
_PEFT_FROM, _PEFT_BELOW = Version("0.21"), Version("0.22")


def qaa_type(name: str = "QAA") -> PeftType:
    """The member of the enum, added if need be: Python keeps enums closed, PEFT keeps methods in one.

    Raises:
        TrainingError: for a PEFT or a Python whose enum is not known to take it.
    """
    found = Version(peft.__version__)
    if not _PEFT_FROM <= found < _PEFT_BELOW:
        raise TrainingError(
            f"peft {found} is installed; QAA enters private tables of PEFT that were checked for "
            f"peft>={_PEFT_FROM},<{_PEFT_BELOW}: install one of those"
        )
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
        raise TrainingError(f"PEFT's enum of methods takes no new member {name} on this Python")
    return member
