-- The event log for a long life: split into ranges of positions, with a second witness of every append, roles that can
-- only do their own part, and room for sealed history.
--
-- What an append costs must not grow with the log. So no index spans it: each range of positions is a table with
-- indexes of its own, the newest of which stays in memory, and what is needed of older ranges (the version that each
-- scope had at their end) is kept beside them.

-- Roles belong to the whole cluster and databases are migrated in parallel, so losing the race to create one is fine.
do $$
declare
    wanted text;
begin
    foreach wanted in array array['weft_appender', 'weft_projector'] loop
        begin
            if not exists (select from pg_catalog.pg_roles where rolname = wanted) then
                execute format('create role %I nologin', wanted);
            end if;
        exception
            when duplicate_object or unique_violation then
                null;
            when insufficient_privilege then
                raise exception 'role % is missing and % may not create roles', wanted, current_user
                    using hint = format('as a superuser run: create role %1$I nologin; grant %1$I to %2$I; then start again',
                                        wanted, current_user);
        end;
    end loop;
end
$$;

create table weft.log_layout (
    partition_events bigint not null check (partition_events > 0)
);
comment on table weft.log_layout is 'One row: how the log is laid out. Every range keeps the size it was made with.';
comment on column weft.log_layout.partition_events is
    'Positions in one range. A million: the newest range''s indexes, some 100 MB, stay in memory, and a thousand ranges hold a billion events.';
insert into weft.log_layout values (1048576);

create table weft.log_partition (
    first_position bigint      primary key check (first_position > 0),
    last_position  bigint      not null unique check (last_position >= first_position),
    table_name     text        not null,
    made_at        timestamptz not null
);
comment on table weft.log_partition is 'Every range of positions that was ever made, ahead of its events. Ranges follow one another without a gap.';
comment on column weft.log_partition.first_position is 'First position of the range.';
comment on column weft.log_partition.last_position is 'Last position of the range.';
comment on column weft.log_partition.table_name is 'The table in schema weft that holds its rows, until the range is sealed.';
comment on column weft.log_partition.made_at is 'When it was made, by the database clock.';

alter table weft.event rename to event_of_0001;
alter table weft.event_of_0001 rename constraint event_pkey to event_of_0001_pkey;

create table weft.event (
    position       bigint      not null check (position > 0),
    epoch          bigint      not null,
    version        bigint      not null check (version > 0),
    recorded_at    timestamptz not null,
    cause          bigint      check (cause > 0 and cause < position),
    command_id     uuid        not null,
    fingerprint    bytea       check (octet_length(fingerprint) = 32),
    command_events integer     check (command_events > 0),
    schema         smallint    not null check (schema > 0),
    hash           bytea       not null check (octet_length(hash) = 32),
    -- Compared byte by byte, whatever the database's language.
    scope          text        collate "C" not null,
    type           text        not null,
    actor          text        not null,
    reason         text,
    -- json, not jsonb: the text is kept byte for byte, because it is what was hashed.
    payload        json        not null,
    check ((fingerprint is null) = (command_events is null)),
    primary key (position)
) partition by range (position);

comment on table weft.event is 'Every event that is not sealed, in order. Rows are never updated or deleted.';
comment on column weft.event.position is 'Place in the whole log: 1, 2, 3 without a gap, in commit order.';
comment on column weft.event.epoch is 'Life of the database in which the event was recorded, see weft.log_epoch.';
comment on column weft.event.version is 'Place in its scope: 1, 2, 3 without a gap.';
comment on column weft.event.recorded_at is 'Database time of its append; never decreases along positions.';
comment on column weft.event.cause is 'Position of the event that led to this one, if any.';
comment on column weft.event.command_id is 'Id of the command that recorded the event; chosen by the caller, time-ordered (UUIDv7).';
comment on column weft.event.fingerprint is 'On the first event of a command: SHA-256 of what the command asked for, so that a repeat gets the first answer.';
comment on column weft.event.command_events is 'On the first event of a command: how many events it recorded, this one included; they stand together.';
comment on column weft.event.schema is 'Version of the payload''s format within its type.';
comment on column weft.event.hash is 'SHA-256 over the previous event''s hash and everything in this row but fingerprint and command_events.';
comment on column weft.event.scope is 'What the event is about; the unit of optimistic concurrency.';
comment on column weft.event.type is 'What happened, in the past tense.';
comment on column weft.event.actor is 'Who did it.';
comment on column weft.event.reason is 'Why, in the words of whoever did it.';
comment on column weft.event.payload is 'The event''s data, byte for byte as it was appended.';

create table weft.log_batch (
    last_position  bigint      primary key,
    first_position bigint      not null check (first_position > 0),
    epoch          bigint      not null,
    recorded_at    timestamptz not null,
    hash           bytea       not null check (octet_length(hash) = 32),
    commands_hash  bytea       not null check (octet_length(commands_hash) = 32),
    marks          bytea       not null,
    check (first_position <= last_position),
    check (octet_length(marks) = 8 * (last_position - first_position + 1))
);
comment on table weft.log_batch is
    'One row for each transaction that appended: a second witness of what weft.event holds, and where the log ends.';
comment on column weft.log_batch.last_position is 'Position of the last event of the transaction.';
comment on column weft.log_batch.first_position is 'Position of its first event: the one after the last of the row before.';
comment on column weft.log_batch.epoch is 'Epoch in which it appended.';
comment on column weft.log_batch.recorded_at is 'Time of all its events.';
comment on column weft.log_batch.hash is 'Chain hash at last_position.';
comment on column weft.log_batch.commands_hash is
    'SHA-256 over its commands: the text "weft-commands/1", a line feed, then for each its id, first position, number of events (four bytes) and fingerprint.';
comment on column weft.log_batch.marks is
    'Eight bytes for each event, to tell which one was changed: the first of its hash; on the first event of a command combined by exclusive or with the four quarters of its fingerprint and its number of events.';

create table weft.scope_head (
    scope    text   collate "C" primary key,
    version  bigint not null check (version > 0),
    position bigint not null check (position > 0)
);
comment on table weft.scope_head is
    'The last version of each scope as of weft.scope_head_mark. Derived: with it, nobody looks for a scope in older ranges.';
comment on column weft.scope_head.scope is 'The scope.';
comment on column weft.scope_head.version is 'Its version at the mark.';
comment on column weft.scope_head.position is 'Position of the event that brought it there.';

create table weft.scope_head_mark (position bigint primary key);
comment on table weft.scope_head_mark is 'Up to where weft.scope_head knows the log: the largest position here, always the end of a range.';
comment on column weft.scope_head_mark.position is 'End of a range that was taken in.';

create table weft.log_segment (
    first_position    bigint      primary key check (first_position > 0),
    last_position     bigint      not null unique check (last_position >= first_position),
    first_recorded_at timestamptz not null,
    last_recorded_at  timestamptz not null,
    previous_hash     bytea       not null check (octet_length(previous_hash) = 32),
    last_hash         bytea       not null check (octet_length(last_hash) = 32),
    raw_bytes         integer     not null check (raw_bytes > 0),
    body_hash         bytea       not null check (octet_length(body_hash) = 32),
    body              bytea       not null,
    sealed_at         timestamptz not null
);
-- It is compressed already.
alter table weft.log_segment alter column body set storage external;
comment on table weft.log_segment is 'Sealed history, some thousand events a row, compressed. Written by `weft log archive`, read by everything that reads the log.';
comment on column weft.log_segment.first_position is 'Position of its first event: the one after the last of the segment before.';
comment on column weft.log_segment.last_position is 'Position of its last event.';
comment on column weft.log_segment.first_recorded_at is 'When its first event was recorded.';
comment on column weft.log_segment.last_recorded_at is 'When its last event was recorded.';
comment on column weft.log_segment.previous_hash is 'Chain hash before its first event.';
comment on column weft.log_segment.last_hash is 'Chain hash at its last event. The hashes between follow from the events.';
comment on column weft.log_segment.raw_bytes is 'Length of the body once decompressed.';
comment on column weft.log_segment.body_hash is 'SHA-256 of the body, as it is stored.';
comment on column weft.log_segment.body is 'The events in columns, a protobuf message, compressed with zstd.';
comment on column weft.log_segment.sealed_at is 'When it was sealed, by the database clock.';

-- Runs as its owner, so that who appends needs no right to create tables; takes no argument, so that there is nothing to
-- misuse. Always two whole ranges ahead of the log's end: an appender that makes them at leisure never waits for one.
create function weft.make_partitions() returns bigint language plpgsql security definer
    set search_path = pg_catalog, pg_temp as $$
declare
    size       bigint;
    made_to    bigint;
    log_end    bigint;
    first      bigint;
    name       text;
begin
    -- One at a time.
    lock table weft.log_layout in share row exclusive mode;
    select partition_events into strict size from weft.log_layout;
    select coalesce(max(last_position), 0) into made_to from weft.log_partition;
    select coalesce(max(last_position), 0) into log_end from weft.log_batch;
    while made_to < log_end + 2 * size loop
        first := made_to + 1;
        made_to := made_to + size;
        name := 'event_' || first;
        execute format('create table weft.%I (like weft.event including all)', name);
        execute format('create unique index on weft.%I (scope, version)', name);
        -- One entry a command. Ids are time-ordered, so new ones go to the right end.
        execute format('create index on weft.%I (command_id) where fingerprint is not null', name);
        -- Time follows position, so a few summary pages answer a time range.
        execute format('create index on weft.%I using brin (recorded_at) with (pages_per_range = 32, autosummarize = on)', name);
        execute format('create trigger append_only before update or delete or truncate on weft.%I
                            for each statement execute function weft.refuse_change()', name);
        execute format('alter table weft.%I enable always trigger append_only', name);
        execute format('alter table weft.event attach partition weft.%I for values from (%s) to (%s)', name, first, made_to + 1);
        insert into weft.log_partition values (first, made_to, name, clock_timestamp());
    end loop;
    return made_to;
end
$$;
comment on function weft.make_partitions() is
    'Makes the ranges that the log will need next, if they are missing. Returns the last position that has one.';

-- Likewise. Takes in one range at a time: a second or so of work.
create function weft.close_partition() returns bigint language plpgsql security definer
    set search_path = pg_catalog, pg_temp as $$
declare
    mark    bigint;
    log_end bigint;
    low     bigint;
    high    bigint;
begin
    lock table weft.scope_head_mark in share row exclusive mode;
    select coalesce(max(position), 0) into mark from weft.scope_head_mark;
    select coalesce(max(last_position), 0) into log_end from weft.log_batch;
    select first_position, last_position into low, high from weft.log_partition
        where first_position > mark and last_position <= log_end order by first_position limit 1;
    if not found then
        return null;
    end if;
    insert into weft.scope_head as head (scope, version, position)
        select scope, max(version), max(position) from weft.event where position between low and high group by scope
        on conflict (scope) do update set version = excluded.version, position = excluded.position
        where head.version < excluded.version;
    insert into weft.scope_head_mark values (high);
    return high;
end
$$;
comment on function weft.close_partition() is
    'Takes the versions of the next full range into weft.scope_head. Returns its last position; null if no range is full.';

-- Says whether an append that was prepared without the lock may go on: the log ends where the appender thinks, what it has
-- read is still there, and none of the commands was recorded before. Otherwise it ends the transaction.
create function weft.expect_ground(
    wanted_tail bigint, wanted_hash bytea, read_position bigint, read_hash bytea, wanted_epoch bigint, ids uuid[], ids_after bigint
) returns timestamptz language plpgsql as $$
declare
    found_tail bigint;
    found_hash bytea;
begin
    select last_position, hash into found_tail, found_hash from weft.log_batch order by last_position desc limit 1;
    if coalesce(found_tail, 0) <> wanted_tail or (wanted_tail > 0 and found_hash <> wanted_hash) then
        raise exception 'the log does not end at %', wanted_tail using errcode = 'WF001';
    end if;
    if wanted_tail > 0 and (select hash from weft.event where position = wanted_tail) is distinct from wanted_hash then
        raise exception 'event % is not as it was', wanted_tail using errcode = 'WF001';
    end if;
    if read_position > 0 and (select hash from weft.event where position = read_position) is distinct from read_hash
       and not exists (select from weft.log_segment where last_position >= read_position) then
        raise exception 'event % is not as it was read', read_position using errcode = 'WF001';
    end if;
    if (select max(epoch) from weft.log_epoch) is distinct from wanted_epoch then
        raise exception 'epoch % is over', wanted_epoch using errcode = 'WF001';
    end if;
    if exists (select from weft.event where command_id = any(ids) and fingerprint is not null and position > ids_after) then
        raise exception 'a command was recorded before' using errcode = 'WF001';
    end if;
    if 'off' in (current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit')) then
        raise exception 'the server may lose what it acknowledges' using errcode = 'WF001';
    end if;
    return clock_timestamp();
end
$$;
comment on function weft.expect_ground(bigint, bytea, bigint, bytea, bigint, uuid[], bigint) is
    'Ends an append''s transaction with WF001 unless the log is as the appender expects. Returns the database clock.';

-- What was recorded so far moves into the new tables, each command with what it was answered.
insert into weft.log_batch (last_position, first_position, epoch, recorded_at, hash, commands_hash, marks)
    select outcome.last_position, outcome.first_position, outcome.epoch, outcome.recorded_at, tail.hash,
           sha256(convert_to('weft-commands/1' || chr(10), 'UTF8') || uuid_send(outcome.command_id) || int8send(outcome.first_position)
                  || int4send((outcome.last_position - outcome.first_position + 1)::integer) || outcome.fingerprint),
           (select string_agg(int8send((
                       ('x' || encode(substring(event.hash from 1 for 8), 'hex'))::bit(64)
                       # case when event.position = outcome.first_position then
                             ('x' || encode(substring(outcome.fingerprint from 1 for 8), 'hex'))::bit(64)
                             # ('x' || encode(substring(outcome.fingerprint from 9 for 8), 'hex'))::bit(64)
                             # ('x' || encode(substring(outcome.fingerprint from 17 for 8), 'hex'))::bit(64)
                             # ('x' || encode(substring(outcome.fingerprint from 25 for 8), 'hex'))::bit(64)
                             # (outcome.last_position - outcome.first_position + 1)::bit(64)
                         else 0::bigint::bit(64) end)::bigint), ''::bytea order by event.position)
            from weft.event_of_0001 as event
            where event.position between outcome.first_position and outcome.last_position)
    from weft.command_outcome as outcome join weft.event_of_0001 as tail on tail.position = outcome.last_position;
select weft.make_partitions();
insert into weft.event (position, epoch, version, recorded_at, cause, command_id, fingerprint, command_events, schema, hash, scope,
                        type, actor, reason, payload)
    select event.position, event.epoch, event.version, event.recorded_at, event.cause, event.command_id, outcome.fingerprint,
           (outcome.last_position - outcome.first_position + 1)::integer, event.schema, event.hash, event.scope, event.type,
           event.actor, event.reason, event.payload
    from weft.event_of_0001 as event left join weft.command_outcome as outcome on outcome.first_position = event.position
    order by event.position;

create or replace view audit.events as
select position,
       epoch,
       scope collate "default" as scope,
       version,
       type,
       actor,
       reason,
       cause,
       command_id,
       recorded_at,
       schema,
       payload,
       encode(hash, 'hex') as hash
from weft.event;
comment on view audit.events is
    'Every event that is not sealed: who did what to which scope, when and why. Sealed ones are listed in audit.sealed.';

-- Two views looked at the old table. What they ask is in the batches as well, also of sealed history.
create or replace view status.sidecars as
select wanted.instance,
       format('%s.%s', wanted.epoch, wanted.position)                                   as wanted,
       case when ack.position is not null then format('%s.%s', ack.epoch, ack.position) end as applied,
       case
           when (ack.epoch, ack.position) >= (wanted.epoch, wanted.position) then 0.0
           else round(greatest(extract(epoch from clock_timestamp() - coalesce(
               -- It was put into its class after what it runs: what the class had before is not its delay.
               case when sidecar.since > coalesce(ack.position, 0) then sidecar.assigned_at end,
               (select min(history.produced_at) from weft.manifest_history as history
                where history.class_id = wanted.class_id and history.position > ack.position),
               -- It runs this position in an earlier epoch: the first event of this one is what is new for it.
               greatest(wanted.produced_at,
                        (select batch.recorded_at
                         from weft.log_epoch as begun join weft.log_batch as batch on batch.last_position > begun.fork_position
                         where begun.epoch = wanted.epoch order by batch.last_position limit 1)))), 0)::numeric, 3)
       end                                                                              as lag_seconds,
       coalesce(ack.connected and ack.seen_at > clock_timestamp() - interval '25 seconds', false) as connected,
       ack.seen_at                                                                      as last_seen,
       ack.controller,
       ack.took_ms,
       ack.error
from weft.proxy_config_snapshot as wanted
join weft.sidecar_class as sidecar using (instance)
left join weft.sidecar_ack as ack using (instance);

create or replace view status.log as
select coalesce(tail.epoch, 0)             as epoch,
       coalesce(tail.position, 0)          as head,
       tail.recorded_at                    as last_event_at,
       coalesce((select max(epoch) from weft.log_epoch), 0) as open_epoch,
       coalesce(projection.position, 0)    as projected,
       projection.updated_at               as projected_at,
       coalesce(tail.position, 0) - coalesce(projection.position, 0) as projection_lag
from (values (1)) as one
left join lateral (select epoch, last_position as position, recorded_at from weft.log_batch order by last_position desc limit 1)
    as tail on true
left join weft.projection as projection on projection.name = 'mesh';

create view audit.sealed as
select first_position,
       last_position,
       last_position - first_position + 1 as events,
       first_recorded_at,
       last_recorded_at,
       octet_length(body) as bytes,
       encode(last_hash, 'hex') as last_hash,
       sealed_at
from weft.log_segment;
comment on view audit.sealed is 'Sealed history. `weft log` and every other command read it as if it were rows; SQL sees what it spans.';
comment on column audit.sealed.first_position is 'Position of the first event.';
comment on column audit.sealed.last_position is 'Position of the last event.';
comment on column audit.sealed.events is 'How many events it holds.';
comment on column audit.sealed.first_recorded_at is 'When the first one was recorded.';
comment on column audit.sealed.last_recorded_at is 'When the last one was recorded.';
comment on column audit.sealed.bytes is 'Bytes that they take.';
comment on column audit.sealed.last_hash is 'Hex of the chain hash at the last event.';
comment on column audit.sealed.sealed_at is 'When they were sealed.';

-- As before, but the log's rows begin after what is sealed.
create or replace function audit.position_at(at timestamptz) returns bigint language plpgsql stable parallel safe as $$
declare
    low    bigint;
    high   bigint;
    middle bigint;
begin
    select coalesce(max(last_position), 0) into low from weft.log_segment where last_recorded_at <= at;
    if exists (select from weft.log_segment where last_recorded_at > at) then
        return low;
    end if;
    select greatest(coalesce(max(last_position), 0), low) into high from weft.log_batch;
    while low < high loop
        middle := low + (high - low + 1) / 2;
        if (select recorded_at <= at from weft.event where position = middle) then
            low := middle;
        else
            high := middle - 1;
        end if;
    end loop;
    return low;
end
$$;
comment on function audit.position_at(timestamptz) is
    'Position of the last event recorded at or before a point in time; 0 if there is none. In sealed history: of the last segment that ends by then.';

-- Views of the earlier schema that other objects rest on were replaced above, so nothing needs the old tables any more.
drop table weft.command_outcome;
drop table weft.event_of_0001;

do $$
declare
    guarded text;
begin
    foreach guarded in array array['event', 'log_batch', 'log_partition', 'scope_head_mark', 'log_segment'] loop
        -- "Always", so that they also fire for a session that calls itself a replica. They bind superusers too.
        execute format('create trigger append_only before update or delete or truncate on weft.%I
                            for each statement execute function weft.refuse_change()', guarded);
        execute format('alter table weft.%I enable always trigger append_only', guarded);
    end loop;
end
$$;

-- Who reads.
grant select on weft.event, weft.log_batch, weft.log_partition, weft.log_segment, weft.log_layout, weft.scope_head,
    weft.scope_head_mark, audit.events, audit.sealed, public._sqlx_migrations to weft_reader;

-- Who appends: adds to the log, and can change nothing that is in it. The right to update an empty table is what its lock takes.
grant usage on schema weft, audit to weft_appender;
grant select, insert on weft.event, weft.log_batch, weft.log_epoch to weft_appender;
grant select on weft.log_partition, weft.log_segment, weft.scope_head, weft.scope_head_mark, public._sqlx_migrations to weft_appender;
grant update on weft.log_lock to weft_appender;
revoke execute on function weft.make_partitions(), weft.close_partition() from public;
grant execute on function weft.make_partitions(), weft.close_partition() to weft_appender;

-- Who projects: reads the log, and owns what can be derived again.
grant usage on schema weft, audit, status to weft_projector;
grant select on all tables in schema status to weft_projector;
grant select on weft.event, weft.log_batch, weft.log_epoch, weft.log_segment, weft.proxy_config_snapshot,
    public._sqlx_migrations to weft_projector;
grant select, insert, update, delete on weft.lease, weft.projection, weft.proxy_routing_state, weft.interest_class,
    weft.class_manifest, weft.manifest_history, weft.sidecar_class, weft.projected_service, weft.projected_instance, weft.projected_policy,
    weft.sidecar_ack to weft_projector;
