"""What a build prints of warnings is found, and what it says of the machine is not taken for one."""

from tests.conftest import REPOSITORY, load_script

TOOL = load_script(REPOSITORY / "tools" / "check_build.py")
OUTPUT = """\
running build_py
warning: build_py: byte-compiling is disabled, skipping.
copying mmoe/warnings.py -> build/lib/mmoe
"""
DEPRECATED = """\
/env/setuptools/config.py:82: SetuptoolsDeprecationWarning: `license` as a table is deprecated
WARNING `project.license` as a TOML table is deprecated
!!
        By 2027-Feb-18, you need to update your project and remove deprecated calls
"""


def test_what_a_build_warns_of_is_found_once():
    assert TOOL.warned(OUTPUT + DEPRECATED + DEPRECATED) == [
        "SetuptoolsDeprecationWarning: `license` as a table is deprecated",
        "WARNING `project.license` as a TOML table is deprecated",
    ]


def test_a_build_that_warns_of_nothing_has_none():
    assert TOOL.warned(OUTPUT) == []
