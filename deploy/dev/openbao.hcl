storage "raft" {
  path    = "/data/raft"
  node_id = "openbao"
}
listener "tcp" {
  address       = "0.0.0.0:8200"
  tls_cert_file = "/etc/openbao/openbao-tls/tls.crt"
  tls_key_file  = "/etc/openbao/openbao-tls/tls.key"
}
# For development: whoever reads this Secret and the volume reads everything.
seal "static" {
  current_key_id = "1"
  current_key    = "file:///etc/openbao/openbao-unseal/key"
}
audit "file" "stdout" {
  options {
    file_path = "stdout"
  }
}
api_addr     = "https://127.0.0.1:8200"
cluster_addr = "https://127.0.0.1:8201"
