-- A store that commits one event per transaction, as message-db does: written from its documentation, to be compared with.
-- Beside its write there is nothing: no reading functions, no consumer groups, none of its privileges.
create schema baseline;

create table baseline.messages (
    global_position bigserial primary key,
    position        bigint      not null,
    time            timestamp   not null default (now() at time zone 'utc'),
    stream_name     text        not null,
    type            text        not null,
    data            jsonb,
    metadata        jsonb,
    id              uuid        not null default gen_random_uuid()
);

-- What stands before the first dash of a stream's name: what its consumers read, and what its writers take turns on.
create function baseline.category(stream_name text) returns text language sql immutable as $$
    select split_part(stream_name, '-', 1)
$$;

create unique index messages_id on baseline.messages (id);
create unique index messages_stream on baseline.messages (stream_name, position);
create index messages_category on baseline.messages
    (baseline.category(stream_name), global_position, baseline.category(metadata ->> 'correlationStreamName'));

-- Writers of one category take turns until their transactions end, so that their global positions commit in order. Then the
-- stream's version is looked up and compared, the first being 0 and that of an empty stream -1.
create function baseline.write_message(
    new_id uuid, stream text, new_type text, new_data jsonb, new_metadata jsonb, expected_version bigint
) returns bigint language plpgsql as $$
declare
    current_version bigint;
    next_position   bigint;
begin
    perform pg_advisory_xact_lock(hashtextextended(baseline.category(stream), 0));
    select coalesce(max(position), -1) into current_version from baseline.messages where stream_name = stream;
    if expected_version is not null and expected_version <> current_version then
        raise exception 'stream % is at version %, not at %', stream, current_version, expected_version;
    end if;
    next_position := current_version + 1;
    insert into baseline.messages (id, stream_name, position, type, data, metadata)
        values (new_id, stream, next_position, new_type, new_data, new_metadata);
    return next_position;
end
$$;
