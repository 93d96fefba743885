#!/bin/sh
# Sets Vault or OpenBao up for keyvault. Run it with the `vault` command on PATH (OpenBao's: with
# VAULT_CLI=bao), VAULT_ADDR, VAULT_CACERT and an administrator's VAULT_TOKEN; again whenever you
# like: it changes what differs.
#
#   setup.sh                              engines, policies, keys, audited header
#   setup.sh approle                      and two AppRoles, keyvault-data and keyvault-admin
#   setup.sh kubernetes                   and two Kubernetes roles of the same names
#
# Settings (environment): TRANSIT (transit), KV (byokeep), PREFIX (byokeep-: what names of keys
# start with), ROLES (keyvault-: what names of policies and login roles start with), TOKEN_TTL
# (15m), TOKEN_MAX_TTL (1h), SECRET_ID_TTL (0, no end), KUBERNETES_NAMESPACE (byokeep),
# KUBERNETES_AUDIENCE (vault).
set -eu

vault() { command "${VAULT_CLI:-vault}" "$@"; }
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
transit=${TRANSIT:-transit}
kv=${KV:-byokeep}
prefix=${PREFIX:-byokeep-}
roles="${ROLES:-keyvault-}data ${ROLES:-keyvault-}admin"
ttl=${TOKEN_TTL:-15m}
max_ttl=${TOKEN_MAX_TTL:-1h}

mounted() { # auth|secrets PATH: is something mounted there?
	vault "$1" list -format=json | grep -q "\"$2/\":"
}

mounted secrets "$transit" || vault secrets enable -path="$transit" transit
mounted secrets "$kv" || vault secrets enable -path="$kv" -version=2 kv

# A key/value engine of version 2 needs a moment after it was enabled.
tries=0
until vault kv metadata put -mount="$kv" -cas-required=true -max-versions=100 anchor >/dev/null; do
	tries=$((tries + 1))
	[ "$tries" -lt 20 ] || exit 1
	sleep 0.5
done

for role in $roles; do
	sed -e "s#\"transit/#\"$transit/#" -e "s#\"byokeep/data#\"$kv/data#" -e "s#/byokeep-#/$prefix#" \
		"$here/policies/keyvault-${role##*-}.hcl" | vault policy write "$role" -
done

# Signs the audit log's checkpoints. Neither role may create, change or delete it.
vault read "$transit/keys/${prefix}checkpoint" >/dev/null 2>&1 ||
	vault write -f "$transit/keys/${prefix}checkpoint" type=ed25519 >/dev/null

# keyvault names the lease that a data key is opened for; Vault's audit log has to show it in
# the clear (it is an id) for `byokeep admin reconcile-vault`. That, and audit devices, are the
# root namespace's alone.
header="sys/config/auditing/request-headers/X-Byokeep-Lease hmac=false"
if [ -n "${VAULT_NAMESPACE:-}" ]; then
	echo "setup.sh: in the root namespace, do as well: vault write $header" >&2
else
	# shellcheck disable=SC2086 # two words
	vault write $header >/dev/null
	vault audit list 2>/dev/null | grep -q / ||
		echo "setup.sh: no audit device is enabled; see README.md: Vault records nothing" >&2
fi

case ${1:-} in
"") ;;
approle)
	mounted auth approle || vault auth enable approle
	# Vault locks a role out for 15 minutes after five failed logins: whoever knows a role id
	# could keep keyvault out. A secret id is 128 random bits; nobody guesses it.
	vault auth tune -user-lockout-disable=true approle/
	for role in $roles; do
		vault write "auth/approle/role/$role" token_policies="$role" token_no_default_policy=true \
			token_type=service token_ttl="$ttl" token_max_ttl="$max_ttl" \
			secret_id_ttl="${SECRET_ID_TTL:-0}" >/dev/null
	done
	;;
kubernetes)
	mounted auth kubernetes || vault auth enable kubernetes
	for role in $roles; do
		vault write "auth/kubernetes/role/$role" bound_service_account_names="$role" \
			bound_service_account_namespaces="${KUBERNETES_NAMESPACE:-byokeep}" \
			audience="${KUBERNETES_AUDIENCE:-vault}" token_policies="$role" \
			token_no_default_policy=true token_type=service token_ttl="$ttl" \
			token_max_ttl="$max_ttl" >/dev/null
	done
	;;
*)
	echo "setup.sh [approle|kubernetes]" >&2
	exit 2
	;;
esac
