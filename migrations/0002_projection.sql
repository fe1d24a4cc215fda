-- What the projector derives from the log. Everything here can be thrown away and is then written again.
--
-- One controller at a time writes these tables, each time in one transaction together with its checkpoint; which one
-- is decided by weft.lease, and that no other succeeds by the condition on weft.projection (term, position).
-- The version of every row is (epoch of the checkpoint, position of the row).

create table weft.lease (
    name       text        primary key,
    term       bigint      not null check (term > 0),
    holder     text        not null,
    holder_id  uuid        not null,
    expires_at timestamptz not null
);
comment on table weft.lease is 'Who tries to write the projection. A lease that is past its time can be taken by anybody.';
comment on column weft.lease.name is 'What the lease is for.';
comment on column weft.lease.term is 'Grows by one each time the lease is taken.';
comment on column weft.lease.holder is 'Name of the controller that took it last.';
comment on column weft.lease.holder_id is 'Tells apart two processes of one name.';
comment on column weft.lease.expires_at is 'Until when it is held, by the database clock.';

create table weft.projection (
    name       text        primary key,
    term       bigint      not null check (term > 0),
    epoch      bigint      not null check (epoch >= 0),
    position   bigint      not null check (position >= 0),
    updated_at timestamptz not null
);
comment on table weft.projection is 'The checkpoint: how far the log is folded into the rows beside it.';
comment on column weft.projection.name is 'Which projection.';
comment on column weft.projection.term is 'Only the holder of this term of the lease may write.';
comment on column weft.projection.epoch is 'Epoch of the last event that was folded; 0 if none was.';
comment on column weft.projection.position is 'Position of the last event that was folded; 0 if none was.';
comment on column weft.projection.updated_at is 'When the checkpoint was last moved, by the database clock.';

create table weft.proxy_routing_state (
    shard_key text   primary key,
    position  bigint not null,
    hash      bytea  not null check (octet_length(hash) = 32),
    body      bytea  not null
);
comment on table weft.proxy_routing_state is 'The shards that snapshots are made of, one row each.';
comment on column weft.proxy_routing_state.shard_key is 'endpoints/<ns>/<service>, inbound/<ns>/<service> or trust.';
comment on column weft.proxy_routing_state.position is 'The last event that touched what the shard is built from.';
comment on column weft.proxy_routing_state.hash is 'SHA-256 of body.';
comment on column weft.proxy_routing_state.body is 'Canonical bytes, as sidecars receive them (compressed).';

create table weft.interest_class (
    class_id  text primary key,
    service   text not null,
    upstreams text
);
comment on table weft.interest_class is 'Sidecars that may see the same services share a class, and so a manifest.';
comment on column weft.interest_class.class_id is 'Derived from service and upstreams.';
comment on column weft.interest_class.service is 'The service that the sidecars stand before.';
comment on column weft.interest_class.upstreams is 'The services that they may connect to, separated by spaces; null for all.';

create table weft.class_manifest (
    class_id    text        primary key,
    position    bigint      not null,
    hash        bytea       not null check (octet_length(hash) = 32),
    body        bytea       not null,
    produced_at timestamptz not null
);
comment on table weft.class_manifest is 'The newest manifest of each interest class: the list of its shards and their hashes.';
comment on column weft.class_manifest.class_id is 'The class.';
comment on column weft.class_manifest.position is 'The last event that touched anything in it.';
comment on column weft.class_manifest.hash is 'SHA-256 of body.';
comment on column weft.class_manifest.body is 'Canonical bytes.';
comment on column weft.class_manifest.produced_at is 'When it was written, by the database clock.';

create table weft.manifest_history (
    class_id    text        not null,
    position    bigint      not null,
    produced_at timestamptz not null,
    primary key (class_id, position)
);
comment on table weft.manifest_history is
    'When each of the last manifests of a class was produced; from it follows how long a sidecar has been behind.';
comment on column weft.manifest_history.class_id is 'The class.';
comment on column weft.manifest_history.position is 'Position of the manifest.';
comment on column weft.manifest_history.produced_at is 'When it was written, by the database clock.';

create table weft.sidecar_class (
    instance    text        primary key,
    class_id    text        not null,
    since       bigint      not null,
    assigned_at timestamptz not null
);
create index sidecar_class_by_class on weft.sidecar_class (class_id);
comment on table weft.sidecar_class is 'The interest class of each sidecar that takes part.';
comment on column weft.sidecar_class.instance is '<ns>/<service>/<instance>';
comment on column weft.sidecar_class.class_id is 'Its class.';
comment on column weft.sidecar_class.since is 'The event that put it there.';
comment on column weft.sidecar_class.assigned_at is 'When that was written, by the database clock.';

-- A view, not one row per sidecar: a change of a class that ten thousand sidecars share writes one manifest.
create view weft.proxy_config_snapshot as
select sidecar.instance,
       sidecar.class_id,
       projection.epoch,
       greatest(manifest.position, sidecar.since) as position,
       manifest.hash                              as manifest_hash,
       greatest(manifest.produced_at, sidecar.assigned_at) as produced_at
from weft.sidecar_class as sidecar
join weft.class_manifest as manifest using (class_id)
cross join weft.projection as projection
where projection.name = 'mesh';
comment on view weft.proxy_config_snapshot is 'The newest snapshot of each sidecar: its class, version and manifest.';

create table weft.projected_service (
    name          text   primary key,
    address       text,
    ports         json   not null,
    version       bigint not null,
    position      bigint not null,
    changed_at_ms bigint not null,
    actor         text   not null
);
comment on table weft.projected_service is 'Services that exist. Read status.services.';

create table weft.projected_instance (
    instance          text    primary key,
    service           text    not null,
    state             text    not null,
    address           text    not null,
    port              integer not null,
    upstreams         text,
    metadata          json    not null,
    version           bigint  not null,
    position          bigint  not null,
    changed_at_ms     bigint  not null,
    actor             text    not null,
    health            text    not null,
    health_revision   bigint,
    health_detail     text,
    health_at_ms      bigint,
    leaf_serial       text,
    leaf_not_after_ms bigint
);
comment on table weft.projected_instance is 'Instances that are ready or draining. Read status.endpoints and status.health.';

create table weft.projected_policy (
    scope         text   primary key,
    kind          text   not null,
    version       bigint not null,
    position      bigint not null,
    changed_at_ms bigint not null,
    actor         text   not null,
    spec          json   not null,
    summary       text   not null
);
comment on table weft.projected_policy is 'Policies and defaults in force. Read status.policies.';

-- Not derived from the log: what sidecars said to whichever controller they talk to. Written by every controller,
-- coalesced, one row per sidecar, until a day after it stopped taking part; losing it loses nothing but a moment of
-- status.
create table weft.sidecar_ack (
    instance      text        primary key,
    controller    text        not null,
    controller_id uuid        not null,
    connected     boolean     not null,
    epoch         bigint,
    position      bigint,
    manifest_hash bytea,
    took_ms       bigint,
    error         text,
    seen_at       timestamptz not null
) with (fillfactor = 70);
comment on table weft.sidecar_ack is 'What each sidecar last said that it runs. Read status.sidecars.';
comment on column weft.sidecar_ack.controller is 'The controller that heard it.';
comment on column weft.sidecar_ack.controller_id is 'Tells apart two processes of one name.';
comment on column weft.sidecar_ack.connected is 'It was subscribed there when this row was written.';
comment on column weft.sidecar_ack.epoch is 'Epoch of what it runs; null if it runs nothing.';
comment on column weft.sidecar_ack.position is 'Position of what it runs; null if it runs nothing.';
comment on column weft.sidecar_ack.manifest_hash is 'Manifest of what it runs.';
comment on column weft.sidecar_ack.took_ms is 'How long it took from notice to swap.';
comment on column weft.sidecar_ack.error is 'Why it refused its newest snapshot; null if it did not.';
comment on column weft.sidecar_ack.seen_at is 'When it was last heard of, by the database clock.';

grant select on weft.lease, weft.projection, weft.proxy_routing_state, weft.interest_class, weft.class_manifest,
    weft.manifest_history, weft.sidecar_class, weft.proxy_config_snapshot, weft.projected_service,
    weft.projected_instance, weft.projected_policy, weft.sidecar_ack to weft_reader;
