# Starts PostgreSQL; makes the cluster, and a role and a database for each zone, where they are missing.
# A zone's role reaches its own database alone.
set -eu
export PGDATA=/data/pgdata
if [ ! -s "$PGDATA/PG_VERSION" ]; then
	initdb --username=postgres --auth-local=trust --auth-host=reject --encoding=UTF8 --no-locale
fi
printf '%s\n' "local all postgres trust" \
	"host keyvault byokeep_keyvault all scram-sha-256" \
	"host orchestrator byokeep_orchestrator all scram-sha-256" >"$PGDATA/pg_hba.conf"

set_up() {
	pg_ctl start --silent --wait -o "-c listen_addresses= -k /run/postgresql" >/dev/null
	for zone in keyvault orchestrator; do
		psql -q -h /run/postgresql -U postgres -v ON_ERROR_STOP=1 -v zone="$zone" \
			-v role="byokeep_$zone" -v password="$(cat "/etc/postgres/passwords/$zone")" <<-'SQL'
				SELECT format('CREATE ROLE %I LOGIN', :'role')
				WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'role') \gexec
				SELECT format('ALTER ROLE %I PASSWORD %L', :'role', :'password') \gexec
				SELECT format('CREATE DATABASE %I OWNER %I', :'zone', :'role')
				WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'zone') \gexec
				SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', :'zone') \gexec
			SQL
	done
	pg_ctl stop --silent --wait --mode=fast >/dev/null
}
set_up
exec postgres -c listen_addresses='*' -k /run/postgresql -c max_connections=200 \
	-c log_error_verbosity=terse -c log_min_error_statement=panic
