-- What a batch remembers of a command is a hash of it from now on; where commands are looked for is known without looking; and an
-- append that was prepared long ago is told so. Nothing that is recorded is changed, and controllers of the version before go on.

alter table weft.log_batch add column marks_format smallint not null default 1 check (marks_format in (1, 2));
comment on column weft.log_batch.marks_format is 'How the marks of its commands were made.';
comment on column weft.log_batch.marks is
    'Eight bytes for each event, to tell which one was changed: the first of its hash; on the first event of a command combined by exclusive or with, in format 2, the first of the SHA-256 of its fingerprint and its number of events (four bytes); in format 1, the four quarters of its fingerprint and its number of events.';

alter table weft.scope_head_mark add column greatest_command uuid;
comment on column weft.scope_head_mark.greatest_command is
    'The greatest id of a command that the range recorded. Ids are ordered by the time that they were made, so a newer one is not looked for in it. Null if it is not known.';

-- As before, and says which commands the range cannot hold.
create or replace function weft.close_partition() returns bigint language plpgsql security definer
    set search_path = pg_catalog, pg_temp as $$
declare
    mark    bigint;
    log_end bigint;
    low     bigint;
    high    bigint;
    newest  uuid;
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
    select command_id into newest from weft.event
        where position between low and high and fingerprint is not null order by command_id desc limit 1;
    insert into weft.scope_head_mark (position, greatest_command) values (high, coalesce(newest, '00000000-0000-0000-0000-000000000000'));
    return high;
end
$$;

-- As the function of the same name that was there; and ends the transaction also if the appender's idea of
-- the database's clock is wrong: its machine may have slept, or the clock was set.
create function weft.expect_ground(
    wanted_tail bigint, wanted_hash bytea, read_position bigint, read_hash bytea, wanted_epoch bigint, ids uuid[], ids_after bigint,
    wanted_now timestamptz, allow_unsafe boolean
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
    if not allow_unsafe
       and 'off' in (current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit')) then
        raise exception 'the server may lose what it acknowledges' using errcode = 'WF001';
    end if;
    -- Wider than a batch waits for the lock and for the one before it.
    if abs(extract(epoch from clock_timestamp() - wanted_now)) > 3 then
        raise exception 'it is not %', wanted_now using errcode = 'WF001';
    end if;
    return clock_timestamp();
end
$$;
comment on function weft.expect_ground(bigint, bytea, bigint, bytea, bigint, uuid[], bigint, timestamptz, boolean) is
    'Ends an append''s transaction with WF001 unless the log and the clock are as the appender expects. Returns the database clock.';

-- What controllers of the version before call: they say nothing about the clock, and allow nothing unsafe.
create or replace function weft.expect_ground(
    wanted_tail bigint, wanted_hash bytea, read_position bigint, read_hash bytea, wanted_epoch bigint, ids uuid[], ids_after bigint
) returns timestamptz language sql as $$
    select weft.expect_ground(wanted_tail, wanted_hash, read_position, read_hash, wanted_epoch, ids, ids_after, clock_timestamp(), false)
$$;
