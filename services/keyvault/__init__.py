"""keyvault: keeps customers' provider keys; the only zone that can open one."""

import services.common  # noqa: F401 before grpc is loaded
