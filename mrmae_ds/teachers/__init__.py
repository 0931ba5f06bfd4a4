"""Frozen teachers: build one from a recipe, place its weights, call it.

``build_teacher`` builds a :class:`Teacher` of any source (CLIP, timm, a run of this project) on the CPU;
``place_teacher`` puts its weights where the recipe says. Either is called with decoded images and returns a
:class:`TeacherOutput`. These names are the package's public API.
"""

from mrmae_ds.teachers.base import Teacher, TeacherOutput
from mrmae_ds.teachers.build import build_meta_teacher, build_teacher
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.teachers.placement.base import PlacedTeacher
from mrmae_ds.teachers.placement.build import place_teacher

__all__ = [
    "PlacedTeacher",
    "Teacher",
    "TeacherOptions",
    "TeacherOutput",
    "build_meta_teacher",
    "build_teacher",
    "place_teacher",
]
