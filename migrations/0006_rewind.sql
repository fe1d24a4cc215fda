-- A log that lost its end: what was found, and how an operator went on.
--
-- A restored backup or a failover takes the last events away together with every row beside them, so the database cannot tell.
-- Controllers and sidecars that saw more can: what they have seen and the log does not have is recorded here, and until an
-- operator adopts the log as it is, nothing is appended.

create table weft.log_rewind (
    id             bigint      generated always as identity primary key,
    seen_epoch     bigint      not null check (seen_epoch >= 0),
    seen_position  bigint      not null check (seen_position > 0),
    seen_hash      bytea       not null check (octet_length(seen_hash) = 32),
    found_epoch    bigint      not null check (found_epoch >= 0),
    found_position bigint      not null check (found_position >= 0),
    found_hash     bytea       check (octet_length(found_hash) = 32),
    witness        text        not null,
    reported_at    timestamptz not null
);
comment on table weft.log_rewind is
    'Findings: somebody has seen an event that is not in the log. One stands, and stops every append, until a row of weft.log_adoption settles it.';
comment on column weft.log_rewind.id is 'Number of the finding; later ones have larger numbers.';
comment on column weft.log_rewind.seen_epoch is 'Epoch in which the event was seen; at most a later one than its own.';
comment on column weft.log_rewind.seen_position is 'Position at which it was seen.';
comment on column weft.log_rewind.seen_hash is 'Chain hash that it had.';
comment on column weft.log_rewind.found_epoch is 'The epoch that was open when the log was looked at.';
comment on column weft.log_rewind.found_position is 'Where the log ended then; 0 if it was empty.';
comment on column weft.log_rewind.found_hash is 'Chain hash that the log has at seen_position; null if it has no event there, or a sealed one.';
comment on column weft.log_rewind.witness is 'Who has seen it: sidecar <ns>/<service>/<instance>, controller <name>, or projector.';
comment on column weft.log_rewind.reported_at is 'When it was recorded, by the database clock.';

create table weft.log_adoption (
    id            bigint      generated always as identity primary key,
    rewind_upto   bigint      not null unique check (rewind_upto > 0),
    epoch         bigint      not null unique check (epoch > 0),
    fork_position bigint      not null check (fork_position >= 0),
    fork_hash     bytea       check (octet_length(fork_hash) = 32),
    actor         text        not null,
    reason        text        not null,
    adopted_at    timestamptz not null
);
comment on table weft.log_adoption is 'Decisions to go on with the log as it is, without the events that it lost.';
comment on column weft.log_adoption.id is 'Number of the decision.';
comment on column weft.log_adoption.rewind_upto is 'The largest weft.log_rewind.id that it settles; earlier ones are settled, too.';
comment on column weft.log_adoption.epoch is 'The epoch that it opened: larger than every one in the log and every one that a settled finding was seen in.';
comment on column weft.log_adoption.fork_position is 'The last position that the lost history and the adopted one can have in common, as far as the findings tell.';
comment on column weft.log_adoption.fork_hash is 'Chain hash there; null if that event is sealed.';
comment on column weft.log_adoption.actor is 'Who decided.';
comment on column weft.log_adoption.reason is 'Why, in the words of whoever decided.';
comment on column weft.log_adoption.adopted_at is 'When, by the database clock.';

-- The last line: whoever appends, and whatever it knows. Appenders look by themselves and say what was found.
create function weft.refuse_while_rewound() returns trigger language plpgsql as $$
begin
    if exists (select from weft.log_rewind where id > (select coalesce(max(rewind_upto), 0) from weft.log_adoption)) then
        raise exception 'LOG_REWOUND: the log lacks events that were seen, so nothing is appended'
            using errcode = 'WF002', hint = 'see status.rewind; `weft log adopt-history` is the way on';
    end if;
    return null;
end
$$;
comment on function weft.refuse_while_rewound() is 'Trigger function that refuses appends while a finding of weft.log_rewind stands.';
create trigger not_while_rewound before insert on weft.log_batch
    for each statement execute function weft.refuse_while_rewound();
alter table weft.log_batch enable always trigger not_while_rewound;

do $$
declare
    guarded text;
begin
    foreach guarded in array array['log_rewind', 'log_adoption'] loop
        -- "Always", so that they also fire for a session that calls itself a replica. They bind superusers too.
        execute format('create trigger append_only before update or delete or truncate on weft.%I
                            for each statement execute function weft.refuse_change()', guarded);
        execute format('alter table weft.%I enable always trigger append_only', guarded);
    end loop;
end
$$;

alter table weft.projection add column hash bytea check (octet_length(hash) = 32);
comment on column weft.projection.hash is
    'Chain hash at position, so that a projection that was restored with another log is noticed; null until a projector wrote it.';

create view status.rewind as
select rewind.id,
       adoption.id is null                                       as stands,
       format('%s.%s', rewind.seen_epoch, rewind.seen_position)   as seen,
       format('%s.%s', rewind.found_epoch, rewind.found_position) as found,
       rewind.witness,
       rewind.reported_at,
       adoption.epoch                                            as adopted_as,
       adoption.actor                                            as adopted_by,
       adoption.reason,
       adoption.adopted_at
from weft.log_rewind as rewind
left join lateral (select * from weft.log_adoption where rewind_upto >= rewind.id order by rewind_upto limit 1) as adoption on true;
comment on view status.rewind is
    'LOG_REWOUND: events that somebody has seen and the log does not have. While one stands, nothing is appended.';
comment on column status.rewind.id is 'Number of the finding.';
comment on column status.rewind.stands is 'Whether it stops appends; `weft log adopt-history` settles it.';
comment on column status.rewind.seen is 'epoch.position of the event that was seen.';
comment on column status.rewind.found is 'epoch.position at which the log ended when it was looked for.';
comment on column status.rewind.witness is 'Who has seen it.';
comment on column status.rewind.reported_at is 'When it was recorded.';
comment on column status.rewind.adopted_as is 'The epoch that was opened when the log was adopted as it is; null while the finding stands.';
comment on column status.rewind.adopted_by is 'Who decided that.';
comment on column status.rewind.reason is 'Why.';
comment on column status.rewind.adopted_at is 'When.';

grant select on weft.log_rewind, weft.log_adoption to weft_reader, weft_projector, weft_appender;
grant insert on weft.log_rewind, weft.log_adoption to weft_appender;
grant select on status.rewind to weft_reader, weft_projector;
