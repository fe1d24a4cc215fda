#!/bin/sh
# Run once by the PostgreSQL image, when the cluster was made: databases and roles for the mesh and for the sample shop.
set -eu
secrets=/var/lib/weft/secrets/postgres

psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
    --set controller="$(cat "$secrets/weft_controller")" \
    --set reader="$(cat "$secrets/weft_sql")" \
    --set shop="$(cat "$secrets/shop")" <<'SQL'
create role weft_reader nologin;
create role weft_appender nologin;
create role weft_projector nologin;
create role weft_controller login password :'controller' in role weft_appender, weft_projector, weft_reader;
create role weft_sql login password :'reader' in role weft_reader;
create role shop login password :'shop';
drop database if exists weft;
create database weft owner weft_controller template template0;
create database shop owner shop template template0;
revoke all on database weft, shop from public;
grant connect on database weft to weft_sql;
SQL

psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname shop <<'SQL'
set role shop;
create table orders (
    id        bigint generated always as identity primary key,
    item      text not null,
    quantity  integer not null check (quantity > 0),
    placed_at timestamptz not null default now()
);
insert into orders (item, quantity) values ('yarn, red', 3), ('loom, small', 1), ('shuttle', 2);
SQL
