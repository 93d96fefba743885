# Starts OpenBao, and sets it up, as setup.sh says, at each start: openbao.sh kubernetes|approle [FOLDER].
# For approle it writes each role's id and secret id into FOLDER/keyvault-{data,admin}.
# For development: the root token stays on its volume.
set -eu
method=$1
init=/data/init.json
ready=/run/openbao/ready
rm -f "$ready"

finish_kubernetes() {
	bao write auth/kubernetes/config kubernetes_host=https://kubernetes.default.svc >/dev/null
}

finish_approle() {
	for role in keyvault-data keyvault-admin; do
		folder=$1/$role
		mkdir -p "$folder"
		[ ! -s "$folder/secret-id" ] || continue
		bao read -field=role_id "auth/approle/role/$role/role-id" >"$folder/role-id"
		bao write -field=secret_id -f "auth/approle/role/$role/secret-id" >"$folder/secret-id"
	done
}

set_up() {
	umask 077
	# 2: it is sealed, or not set up yet; 1: it does not answer.
	until bao status >/dev/null 2>&1 || [ $? -eq 2 ]; do sleep 0.2; done
	if [ ! -s "$init" ]; then
		bao operator init -format=json >"$init.new" && mv "$init.new" "$init"
	fi
	BAO_TOKEN=$(sed -n 's/.*"root_token": "\(.*\)".*/\1/p' "$init")
	export BAO_TOKEN
	until bao status >/dev/null 2>&1 && bao token lookup >/dev/null 2>&1; do sleep 0.2; done
	sh /etc/vault-setup/setup.sh "$method"
	"finish_$method" "${2:-}"
	touch "$ready"
}

set_up "$@" &
exec bao server -config=/etc/scripts/openbao.hcl
