#!/bin/sh
# Makes folders and secrets on the volume. What is there already stays.
set -eu
umask 077
cd /var/lib/weft

folder() { # folder OWNER MODE PATH
    mkdir -p "$3" && chown "$1" "$3" && chmod "$2" "$3"
}
secret() { # secret OWNER PATH TEXT
    [ -s "$2" ] || { printf '%s\n' "$3" > "$2.new" && chown "$1" "$2.new" && mv "$2.new" "$2"; }
}
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

# In the official image the server runs as 999; root makes and enters its folders.
folder 999 0700 postgres
folder root 0711 secrets
folder 999 0700 secrets/postgres
folder weft 0700 secrets/weft
folder weft 0700 secrets/shop
folder weft 0700 controller
folder weft 0700 operator
folder root 0711 sidecars
for instance in db-1 api-1 api-2 web-1; do folder weft 0700 "sidecars/$instance"; done

secret 999 secrets/postgres/superuser "$(random)"
for role in weft_controller weft_sql shop; do secret 999 "secrets/postgres/$role" "$(random)"; done
password() { cat "secrets/postgres/$1"; }
secret weft secrets/weft/controller.url "postgres://weft_controller:$(password weft_controller)@db-network:5432/weft"
secret weft secrets/weft/reader.url "postgres://weft_sql:$(password weft_sql)@db-network:5432/weft"
# Through the sidecar beside the app.
secret weft secrets/shop/url "postgres://shop:$(password shop)@127.0.0.1:5432/shop"
secret weft operator/context.json \
    '{"controllers": ["controller:7400", "controller-2:7400"], "credential_dir": "/var/lib/weft/controller/operator/admin", "reader_url_file": "/var/lib/weft/secrets/weft/reader.url"}'
