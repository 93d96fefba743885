# Starts OpenBao, and sets it up: by itself at its first start, and again at each, as setup.sh says.
# For development: the root token stays on its volume.
set -eu
init=/data/init.json
ready=/run/openbao/ready
rm -f "$ready"

set_up() {
	# 2: it is sealed, or not set up yet; 1: it does not answer.
	until bao status >/dev/null 2>&1 || [ $? -eq 2 ]; do sleep 0.2; done
	if [ ! -s "$init" ]; then
		(umask 077 && bao operator init -format=json >"$init.new" && mv "$init.new" "$init")
	fi
	BAO_TOKEN=$(sed -n 's/.*"root_token": "\(.*\)".*/\1/p' "$init")
	export BAO_TOKEN
	until bao status >/dev/null 2>&1 && bao token lookup >/dev/null 2>&1; do sleep 0.2; done
	sh /etc/openbao/setup/setup.sh kubernetes
	bao write auth/kubernetes/config kubernetes_host=https://kubernetes.default.svc >/dev/null
	touch "$ready"
}

set_up &
exec bao server -config=/etc/openbao/scripts/openbao.hcl
