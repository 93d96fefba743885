"""keyvault: keeps customers' provider keys; the only zone that can open one."""
