"""The edits: h -> edited h, one class a method.

Open `base.py` for what every edit shares, `rotated.py` and `rotation.py` for those that own a rotation,
`activations.py` for act_fn, `registry.py` for names; every other file is one method. Imports only `errors`.
"""

from reftune.edits.base import Edit, FoldedEdit
from reftune.edits.consreft import ConsreftEdit
from reftune.edits.direft import DireftEdit
from reftune.edits.direft_orthogonal import DireftOrthogonalEdit
from reftune.edits.flat import FlatEdit
from reftune.edits.gated import GatedEdit
from reftune.edits.lobireft import LobireftEdit
from reftune.edits.loreft import LoreftEdit
from reftune.edits.noreft import NoreftEdit
from reftune.edits.registry import available_edits, edit_class, make_edit, method_name, register_edit
from reftune.edits.rotated import RotatedEdit

__all__ = [
    "ConsreftEdit",
    "DireftEdit",
    "DireftOrthogonalEdit",
    "Edit",
    "FlatEdit",
    "FoldedEdit",
    "GatedEdit",
    "LobireftEdit",
    "LoreftEdit",
    "NoreftEdit",
    "RotatedEdit",
    "available_edits",
    "edit_class",
    "make_edit",
    "method_name",
    "register_edit",
]
