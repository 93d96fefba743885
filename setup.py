"""Packs the services, and the stack of one machine, as the wheel `byokeep-services`.

Both stand below one package, as they stand in a checkout: nobody's site-packages gets a top-level
`services` or `deploy`. Its processes start in that folder, where the names are what they are here;
`byokeep.testing` starts them.
"""

from setuptools import find_namespace_packages, setup

_HOME = "byokeep_services"
_FOUND = find_namespace_packages(
    include=["services", "services.*", "deploy", "deploy.local", "deploy.local.*"],
    exclude=["deploy.local.prove"],
)

setup(
    packages=[f"{_HOME}.{name}" for name in _FOUND],
    package_dir={f"{_HOME}.{top}": top for top in ("services", "deploy")},
    package_data={"": ["*.diff", "*.mako", "*.toml"]},
    include_package_data=False,
)
