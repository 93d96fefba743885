"""The runtime that the three services share.

It is imported before grpc is: gRPC reads this variable once, when its library is loaded.
"""

import os

# TLS 1.3 and nothing below. gRPC in Python has no option for it, but takes the suites of TLS 1.2
# from here; the only one left needs a pre-shared key, which nobody has. The suites of TLS 1.3
# are not chosen here, and stay. `docs/decisions/0009` has more.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-AES256-CBC-SHA"
