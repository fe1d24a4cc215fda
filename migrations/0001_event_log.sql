-- The event log: the one source of truth, append-only, hash-chained.
--
-- Positions are never taken from a sequence. The appender takes them from the committed tail while it holds the lock of
-- weft.log_lock up to commit, so position order is commit order and there are no holes.

create schema weft;
comment on schema weft is 'Weft''s own tables. The event log is the truth; everything else can be rebuilt from it.';

create schema audit;
comment on schema audit is 'Stable, documented views over the event log for people.';

-- Roles belong to the whole cluster and databases are migrated in parallel, so losing the race to create it is fine.
do $$
begin
    if not exists (select from pg_catalog.pg_roles where rolname = 'weft_reader') then
        create role weft_reader nologin;
    end if;
exception
    when duplicate_object or unique_violation then
        null;
    when insufficient_privilege then
        raise exception 'role weft_reader is missing and % may not create roles', current_user
            using hint = 'as a superuser run: create role weft_reader nologin; then start again';
end
$$;

-- Nothing is granted on it, so whoever may only read cannot stop writers by holding it.
create table weft.log_lock ();
comment on table weft.log_lock is 'Always empty. Who holds its lock, in exclusive mode, may append to the log.';

create table weft.log_epoch (
    epoch             bigint      primary key check (epoch > 0),
    system_identifier bigint      not null,
    timeline          integer     not null,
    postmaster_start  timestamptz not null,
    event_table       oid         not null,
    fork_position     bigint      not null check (fork_position >= 0),
    fork_hash         bytea       not null check (octet_length(fork_hash) = 32),
    opened_at         timestamptz not null
);
comment on table weft.log_epoch is
    'One row per life of the database: a new one is opened whenever the server, its timeline, its start or the event table is another.';
comment on column weft.log_epoch.epoch is 'Number of this life; later lives have larger numbers.';
comment on column weft.log_epoch.system_identifier is 'Identifier of the database cluster, from pg_control_system().';
comment on column weft.log_epoch.timeline is 'WAL timeline; changes when a standby is promoted or a backup restored.';
comment on column weft.log_epoch.postmaster_start is 'When the database server was started.';
comment on column weft.log_epoch.event_table is 'Oid of weft.event; changes when the log is restored from a dump.';
comment on column weft.log_epoch.fork_position is 'Last position of the log when the epoch was opened; 0 if the log was empty.';
comment on column weft.log_epoch.fork_hash is 'Chain hash at fork_position.';
comment on column weft.log_epoch.opened_at is 'When the epoch was opened, by the database clock.';

create table weft.event (
    position    bigint      primary key check (position > 0),
    epoch       bigint      not null,
    version     bigint      not null check (version > 0),
    recorded_at timestamptz not null,
    cause       bigint      check (cause > 0 and cause < position),
    command_id  uuid        not null,
    schema      smallint    not null check (schema > 0),
    hash        bytea       not null check (octet_length(hash) = 32),
    scope       text        not null,
    type        text        not null,
    actor       text        not null,
    reason      text,
    -- json, not jsonb: the text is kept byte for byte, because it is what was hashed.
    payload     json        not null,
    unique (scope, version)
);
-- Time follows position, so a few summary pages answer a time range.
create index event_recorded_at on weft.event using brin (recorded_at) with (pages_per_range = 32, autosummarize = on);

comment on table weft.event is 'Every event ever recorded, in order. Rows are never updated or deleted.';
comment on column weft.event.position is 'Place in the whole log: 1, 2, 3 without a gap, in commit order.';
comment on column weft.event.epoch is 'Life of the database in which the event was recorded, see weft.log_epoch.';
comment on column weft.event.version is 'Place in its scope: 1, 2, 3 without a gap.';
comment on column weft.event.recorded_at is 'Database time under the log''s lock; never decreases along positions.';
comment on column weft.event.cause is 'Position of the event that led to this one, if any.';
comment on column weft.event.command_id is 'Id of the command that recorded the event; chosen by the caller.';
comment on column weft.event.schema is 'Version of the payload''s format within its type.';
comment on column weft.event.hash is 'SHA-256 over the previous event''s hash and everything in this row.';
comment on column weft.event.scope is 'What the event is about; the unit of optimistic concurrency.';
comment on column weft.event.type is 'What happened, in the past tense.';
comment on column weft.event.actor is 'Who did it.';
comment on column weft.event.reason is 'Why, in the words of whoever did it.';
comment on column weft.event.payload is 'The event''s data, byte for byte as it was appended.';

create table weft.command_outcome (
    command_id     uuid        primary key,
    epoch          bigint      not null,
    first_position bigint      not null check (first_position > 0),
    last_position  bigint      not null check (last_position >= first_position),
    recorded_at    timestamptz not null,
    fingerprint    bytea       not null check (octet_length(fingerprint) = 32),
    -- In the order of the events, for the last one acknowledged and for verification.
    unique (last_position)
);
comment on table weft.command_outcome is
    'What each accepted command recorded, so that a repeat gets the first answer. Refused commands changed nothing and are not kept.';
comment on column weft.command_outcome.command_id is 'Id of the command; chosen by the caller, time-ordered (UUIDv7).';
comment on column weft.command_outcome.epoch is 'Epoch in which it was accepted.';
comment on column weft.command_outcome.first_position is 'Position of the first event that it recorded.';
comment on column weft.command_outcome.last_position is 'Position of the last event that it recorded.';
comment on column weft.command_outcome.recorded_at is 'When it was accepted, by the database clock.';
comment on column weft.command_outcome.fingerprint is 'SHA-256 of what the command asked for.';

create function weft.refuse_change() returns trigger language plpgsql as $$
begin
    raise exception '% on %.% is refused: the event log is append-only', tg_op, tg_table_schema, tg_table_name
        using errcode = 'insufficient_privilege', hint = 'to undo an event, append one that compensates it';
end
$$;
comment on function weft.refuse_change() is 'Trigger function that refuses every change to what has been recorded.';

-- "Always", so that they also fire for a session that calls itself a replica. They bind superusers too.
create trigger append_only before update or delete or truncate on weft.event
    for each statement execute function weft.refuse_change();
alter table weft.event enable always trigger append_only;
create trigger append_only before update or delete or truncate on weft.log_epoch
    for each statement execute function weft.refuse_change();
alter table weft.log_epoch enable always trigger append_only;
create trigger append_only before update or delete or truncate on weft.command_outcome
    for each statement execute function weft.refuse_change();
alter table weft.command_outcome enable always trigger append_only;

create view audit.events as
select position,
       epoch,
       scope,
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
comment on view audit.events is 'Every event ever recorded: who did what to which scope, when and why.';
comment on column audit.events.position is 'Place in the whole log: 1, 2, 3 without a gap, in commit order.';
comment on column audit.events.epoch is 'Life of the database in which the event was recorded.';
comment on column audit.events.scope is 'What the event is about, for example membership/default/web/web-1.';
comment on column audit.events.version is 'Place in its scope: 1, 2, 3 without a gap.';
comment on column audit.events.type is 'What happened, in the past tense.';
comment on column audit.events.actor is 'Who did it.';
comment on column audit.events.reason is 'Why, in the words of whoever did it; null if not given.';
comment on column audit.events.cause is 'Position of the event that led to this one; null if none did.';
comment on column audit.events.command_id is 'Id of the command that recorded it; events of one command share it.';
comment on column audit.events.recorded_at is 'When it was recorded, by the database clock; never decreases along positions.';
comment on column audit.events.schema is 'Version of the payload''s format within its type.';
comment on column audit.events.payload is 'The event''s data; query it with ->, ->> and #>>.';
comment on column audit.events.hash is 'Hex of the SHA-256 that chains this event to the one before it.';

-- Bisection over positions: recorded_at never decreases along them and they have no gap, so this stays a few dozen
-- index look-ups at any size, where a plain max() may walk back over the whole log.
create function audit.position_at(at timestamptz) returns bigint language plpgsql stable parallel safe as $$
declare
    low  bigint := 0;
    high bigint;
    middle bigint;
begin
    select coalesce(max(position), 0) into high from weft.event;
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
    'Position of the last event recorded at or before a point in time; 0 if there is none.';

grant usage on schema weft, audit to weft_reader;
grant select on weft.event, weft.log_epoch, weft.command_outcome, audit.events to weft_reader;
