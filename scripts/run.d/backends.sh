# shellcheck shell=bash
# Vault, PostgreSQL and Redis for scripts/run, each with its data in a directory
# below "$data", on a loopback port counted from the API's.

: "${data:?the directory of what is kept}"

children=() stop_signals=() names=() logs=()

# start SIGNAL NAME LOG COMMAND... starts a command that SIGNAL stops, in a session
# of its own, where an interrupt at the terminal does not reach it before this
# script has stopped what depends on it. If this script is killed, the kernel
# ends the command.
start() {
	local signal=$1 name=$2 log=$3
	shift 3
	setsid setpriv --pdeathsig "$signal" "$@" >>"$log" 2>&1 &
	children+=($!) stop_signals+=("$signal") names+=("$name") logs+=("$log")
}

# forget_child PID says that it has ended by itself. Its number may be another
# process's soon, which stop_children must not meet.
forget_child() {
	local i
	for i in "${!children[@]}"; do
		[[ ${children[i]} == "$1" ]] || continue
		echo "${names[i]} has ended; the others go on. Its log is ${logs[i]}" >&2
		unset "children[i]"
	done
}

# stop_children ends what start started, the youngest first.
stop_children() {
	trap '' HUP INT TERM
	local i pid deadline
	for ((i = ${#names[@]} - 1; i >= 0; i--)); do
		[[ -n ${children[i]:-} ]] || continue
		pid=${children[i]} deadline=$((SECONDS + 60))
		kill -s "${stop_signals[i]}" "$pid" 2>/dev/null || continue
		while kill -0 "$pid" 2>/dev/null; do
			((SECONDS < deadline)) || kill -KILL "$pid"
			sleep 0.1
		done
	done
}

# until_up WHAT LOG COMMAND... waits for the command to succeed.
until_up() {
	local what=$1 log=$2 deadline=$((SECONDS + 60))
	shift 2
	until "$@" >/dev/null 2>&1; do
		if ((SECONDS >= deadline)) || ! kill -0 "${children[-1]}" 2>/dev/null; then
			tail -n 20 "$log" >&2
			echo "$what did not start; its log is $log" >&2
			exit 1
		fi
		sleep 0.2
	done
}

random_password() { openssl rand -hex 24; }

# start_vault PORT: a real Vault in server mode, with file storage, TLS and a
# file audit device; initialised and set up the first time, unsealed every time.
start_vault() {
	local dir=$data/vault
	unset "${!VAULT_@}" # the caller's are for another Vault
	VAULT_CLI=$(vault/devserver/build)
	mkdir -p "$data/bin"
	ln -sfn "$VAULT_CLI" "$data/bin/vault" # for whoever reads the environment file
	export VAULT_CLI VAULT_ADDR=https://127.0.0.1:$1 VAULT_CACERT=$dir/tls.crt
	mkdir -p "$dir"
	if [[ ! -s $dir/tls.crt ]]; then
		openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj /CN=127.0.0.1 \
			-addext subjectAltName=IP:127.0.0.1 -keyout "$dir/tls.key" -out "$dir/tls.crt" 2>/dev/null
	fi
	cat >"$dir/server.hcl" <<-HCL
		storage "file" {
		  path = "$dir/file"
		}
		listener "tcp" {
		  address       = "127.0.0.1:$1"
		  tls_cert_file = "$dir/tls.crt"
		  tls_key_file  = "$dir/tls.key"
		}
		api_addr      = "$VAULT_ADDR"
		disable_mlock = true
	HCL
	start TERM Vault "$dir/server.log" "$VAULT_CLI" server -config="$dir/server.hcl"
	# Any answer will do: it may be sealed, and new.
	until_up Vault "$dir/server.log" curl --silent --noproxy '*' --cacert "$VAULT_CACERT" "$VAULT_ADDR/v1/sys/seal-status"

	if [[ ! -s $dir/init.json ]]; then
		# A run that was interrupted here may have the keys already.
		jq --exit-status .root_token "$dir/init.json.new" >/dev/null 2>&1 ||
			"$VAULT_CLI" operator init -format=json -key-shares=1 -key-threshold=1 >"$dir/init.json.new" || {
			echo "If this Vault was initialised by a run that was interrupted, its keys are lost: remove $dir and start again" >&2
			exit 1
		}
		mv "$dir/init.json.new" "$dir/init.json"
	fi
	# The generic command takes the key from standard input, not from an argument.
	jq '{key: .unseal_keys_b64[0]}' "$dir/init.json" | "$VAULT_CLI" write sys/unseal - >/dev/null || {
		echo "Vault cannot be unsealed; its log is $dir/server.log. If the data directory was moved, Vault must be able to write its audit file where that was once more" >&2
		exit 1
	}
	until_up Vault "$dir/server.log" curl --silent --fail --noproxy '*' --cacert "$VAULT_CACERT" "$VAULT_ADDR/v1/sys/health"

	local token
	token=$(jq -r .root_token "$dir/init.json")
	# Also when the data directory was moved: Vault keeps the path.
	if [[ $(VAULT_TOKEN=$token "$VAULT_CLI" read -format=json sys/audit | jq -r '.data["file/"].options.file_path') != "$dir/audit.log" ]]; then
		VAULT_TOKEN=$token "$VAULT_CLI" audit disable file >/dev/null
		VAULT_TOKEN=$token "$VAULT_CLI" audit enable file file_path="$dir/audit.log" >/dev/null
	fi
	VAULT_TOKEN=$token vault/setup --credentials "$dir/approle" >&2
	export ORGKEYS_KEYSTORE=vault ORGKEYS_VAULT_ROLE_ID_FILE=$dir/approle/role_id ORGKEYS_VAULT_SECRET_ID_FILE=$dir/approle/secret_id
}

# start_postgres PORT. PostgreSQL refuses to run as root; for root it runs as the
# user postgres, who is let through the directories above its own.
start_postgres() {
	local dir=$data/postgres bin as=()
	# The newest one that is installed.
	bin=$(compgen -G '/usr/lib/postgresql/*/bin' | sort -V | tail -n 1)
	mkdir -p "$dir"
	[[ -s $dir/password ]] || random_password >"$dir/password"
	if ((EUID == 0)); then
		chown -R postgres: "$dir"
		# A change of user clears the signal that start has set.
		as=(setpriv --pdeathsig INT --reuid postgres --regid postgres --clear-groups --inh-caps=+dac_override --ambient-caps=+dac_override)
	fi
	if [[ ! -e $dir/cluster ]]; then # initdb writes PG_VERSION first, and may have been killed since
		rm -rf "$dir/cluster.new"
		${as[@]+"${as[@]}"} "$bin/initdb" --pgdata="$dir/cluster.new" --username=orgkeys --pwfile="$dir/password" \
			--auth=scram-sha-256 --encoding=UTF8 --locale=C >"$dir/initdb.log" 2>&1 || { cat "$dir/initdb.log" >&2 && exit 1; }
		mv "$dir/cluster.new" "$dir/cluster"
	fi
	# INT is its fast shutdown; TERM would wait for clients to leave.
	start INT PostgreSQL "$data/postgres.log" ${as[@]+"${as[@]}"} "$bin/postgres" -D "$dir/cluster" -p "$1" \
		-c listen_addresses=127.0.0.1 -c unix_socket_directories=
	until_up PostgreSQL "$data/postgres.log" "$bin/pg_isready" --quiet --host=127.0.0.1 --port="$1"
	echo "postgres://orgkeys:$(<"$dir/password")@127.0.0.1:$1/postgres?sslmode=disable" >"$data/database-url"
	export ORGKEYS_DATABASE_URL_FILE=$data/database-url
}

# start_redis PORT: with an append-only file.
start_redis() {
	local dir=$data/redis
	mkdir -p "$dir"
	[[ -s $dir/password ]] || random_password >"$dir/password"
	cat >"$dir/redis.conf" <<-CONF
		bind 127.0.0.1
		port $1
		dir "$dir"
		appendonly yes
		requirepass $(<"$dir/password")
	CONF
	start TERM Redis "$dir/server.log" redis-server "$dir/redis.conf"
	until_up Redis "$dir/server.log" env REDISCLI_AUTH="$(<"$dir/password")" redis-cli -h 127.0.0.1 -p "$1" ping
	echo "redis://:$(<"$dir/password")@127.0.0.1:$1/0" >"$dir/url"
	export ORGKEYS_REDIS_URL_FILE=$dir/url
}
