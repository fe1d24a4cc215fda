-- How fresh sidecars are: what they say is stored by class, so that a change which ten thousand of them share costs a row,
-- and every change has a row that tells its way from the log into them.

create table weft.controller (
    controller_id   uuid        primary key,
    name            text        not null,
    sidecars        bigint      not null,
    known_within_ms bigint      not null,
    seen_at         timestamptz not null
);
comment on table weft.controller is 'The controllers that serve sidecars. One that died stays for a day. Read status.controllers.';

create table weft.class_ack (
    controller_id uuid        not null references weft.controller on delete cascade,
    class_id      text        not null,
    epoch         bigint      not null,
    position      bigint      not null,
    took_ms       bigint,
    seen_at       timestamptz not null,
    primary key (controller_id, class_id)
) with (fillfactor = 70);
comment on table weft.class_ack is
    'What every sidecar runs at least that is subscribed at a controller and goes with its class. Read status.sidecars.';
comment on column weft.class_ack.took_ms is 'The longest of their last swaps.';

alter table weft.sidecar_ack add column class_id text;
comment on column weft.sidecar_ack.class_id is
    'It runs at least what weft.class_ack says of this class and its controller; null if only this row tells what it runs.';

-- Written by each controller for its own sidecars; a view puts the parts of one version together.
create table weft.propagation (
    epoch         bigint      not null,
    position      bigint      not null,
    controller_id uuid        not null,
    folded_at     timestamptz not null,
    published_at  timestamptz not null,
    interested    bigint      not null,
    applied_ms    real[]      not null,
    sidecars      bigint[]    not null,
    last_ms       real,
    last_sidecar  text,
    primary key (epoch, position, controller_id)
) with (fillfactor = 70);
create index propagation_by_time on weft.propagation (published_at);
comment on table weft.propagation is 'How each version reached the sidecars of each controller. Read status.propagation.';
comment on column weft.propagation.applied_ms is 'After how many milliseconds since published_at, rounded up.';
comment on column weft.propagation.sidecars is 'How many sidecars had applied it then, for each of applied_ms.';

-- The default is that of the model; a test compares them.
create view weft.propagation_bound as
select coalesce((select (spec ->> 'propagation_bound_ms')::bigint from weft.projected_policy where scope = 'mesh'),
                1000) as bound_ms;

create view status.controllers as
select controller.name,
       controller.seen_at > clock_timestamp() - interval '25 seconds' as alive,
       controller.sidecars,
       controller.known_within_ms,
       controller.seen_at
from weft.controller as controller;
comment on view status.controllers is 'Controllers that serve sidecars, and how fresh the other views are that tell of these.';
comment on column status.controllers.name is 'Its name.';
comment on column status.controllers.alive is 'Whether it was heard of within two refreshes, which come every ten seconds.';
comment on column status.controllers.sidecars is 'How many sidecars were subscribed to it then.';
comment on column status.controllers.known_within_ms is
    'What its sidecars do shows in status.sidecars and status.propagation so many milliseconds later at most; grows with their number.';
comment on column status.controllers.seen_at is 'When it last wrote.';

create view weft.sidecar_state as
select wanted.instance,
       wanted.epoch                                                       as wanted_epoch,
       wanted.position                                                    as wanted_position,
       ack.epoch                                                          as applied_epoch,
       ack.position                                                       as applied_position,
       lag.ms                                                             as lag_ms,
       ack.connected,
       ack.seen_at,
       ack.controller,
       ack.took_ms,
       ack.error,
       lag.ms > bound.bound_ms + case when ack.connected then ack.known_within_ms else 0 end as outside_bound
from weft.proxy_config_snapshot as wanted
cross join weft.propagation_bound as bound
join weft.sidecar_class as sidecar using (instance)
left join lateral (
    select case when (class.epoch, class.position) > (own.epoch, own.position) then class.epoch else own.epoch end as epoch,
           case when (class.epoch, class.position) > (own.epoch, own.position) then class.position
                else own.position end                                     as position,
           own.connected and controller.seen_at > clock_timestamp() - interval '25 seconds' as connected,
           case when own.connected then greatest(own.seen_at, controller.seen_at) else own.seen_at end as seen_at,
           own.controller,
           coalesce(class.took_ms, own.took_ms)                           as took_ms,
           own.error,
           controller.known_within_ms
    from weft.sidecar_ack as own
    left join weft.controller as controller using (controller_id)
    left join weft.class_ack as class on class.controller_id = own.controller_id and class.class_id = own.class_id
    where own.instance = wanted.instance) as ack on true
cross join lateral (
    select case
               when (ack.epoch, ack.position) >= (wanted.epoch, wanted.position) then 0.0
               else greatest(extract(epoch from clock_timestamp() - coalesce(
                   -- It was put into its class after what it runs: what the class had before is not its delay.
                   case when sidecar.since > coalesce(ack.position, 0) then sidecar.assigned_at end,
                   (select min(history.produced_at) from weft.manifest_history as history
                    where history.class_id = wanted.class_id and history.position > ack.position),
                   -- It runs this position in an earlier epoch: the first event of this one is what is new for it.
                   greatest(wanted.produced_at,
                            (select batch.recorded_at
                             from weft.log_epoch as begun
                             join weft.log_batch as batch on batch.last_position > begun.fork_position
                             where begun.epoch = wanted.epoch order by batch.last_position limit 1)))) * 1000, 0)::numeric
           end as ms) as lag;
comment on view weft.sidecar_state is 'status.sidecars in numbers.';

create or replace view status.sidecars as
select sidecar.instance,
       format('%s.%s', sidecar.wanted_epoch, sidecar.wanted_position)     as wanted,
       case when sidecar.applied_position is not null
            then format('%s.%s', sidecar.applied_epoch, sidecar.applied_position) end as applied,
       case when sidecar.lag_ms = 0 then 0.0 else round(sidecar.lag_ms / 1000, 3) end as lag_seconds,
       coalesce(sidecar.connected, false)                                 as connected,
       sidecar.seen_at                                                    as last_seen,
       sidecar.controller,
       sidecar.took_ms,
       sidecar.error,
       coalesce(sidecar.outside_bound, false)                             as outside_bound
from weft.sidecar_state as sidecar;
comment on view status.sidecars is
    'What every sidecar should run, what it runs, and how long it has been behind; as of at most status.controllers.known_within_ms ago.';
comment on column status.sidecars.applied is 'The version that it runs at least, as it said; null if it never said.';
comment on column status.sidecars.took_ms is
    'How long its last swap took, from notice to swap; of one that goes with its class, the longest of these.';
comment on column status.sidecars.outside_bound is
    'Behind for longer than the mesh''s propagation bound, and than what it does may take to show here.';

create view status.stale as
select sidecar.* from status.sidecars as sidecar where sidecar.outside_bound;
comment on view status.stale is 'Sidecars outside the propagation bound: what changed has not reached them in time. Empty is good.';

do $$
declare
    named text;
begin
    for named in select attname from pg_attribute where attrelid = 'status.stale'::regclass and attnum > 0 loop
        execute format('comment on column status.stale.%I is %L', named, 'See status.sidecars.' || named || '.');
    end loop;
end
$$;

-- What is known of the append of a version in sealed history is when it was folded.
create view weft.propagation_part as
select part.*, event.recorded_at, event.scope, event.type, event.actor,
       extract(epoch from part.published_at - coalesce(event.recorded_at, part.folded_at)) * 1000 as told_ms
from weft.propagation as part
left join weft.event as event on event.position = part.position and event.epoch = part.epoch;
comment on view weft.propagation_part is 'Rows of weft.propagation beside the event that made the version; told_ms after its append.';

-- Asked for a few versions, it looks at those rows only.
create view status.propagation as
select format('%s.%s', change.epoch, change.position)                                   as version,
       change.position,
       change.type                                                                      as event,
       change.scope,
       change.actor,
       change.appended_at,
       round((extract(epoch from change.folded_at - change.appended_at) * 1000)::numeric, 3)::float8    as folded_ms,
       round((extract(epoch from change.published_at - change.appended_at) * 1000)::numeric, 3)::float8 as published_ms,
       round(spread.p50::numeric, 3)::float8                                            as applied_p50_ms,
       round(spread.p99::numeric, 3)::float8                                            as applied_p99_ms,
       round(change.last_ms::numeric, 3)::float8                                        as applied_last_ms,
       change.last_sidecar,
       change.interested,
       coalesce(spread.applied, 0)::bigint                                              as applied,
       coalesce(spread.in_time, 0)::bigint                                              as within_bound
from (select epoch, position, min(scope) as scope, min(type) as type, min(actor) as actor,
             coalesce(min(recorded_at), min(folded_at)) as appended_at,
             min(folded_at) as folded_at, min(published_at) as published_at, max(interested) as interested,
             max(told_ms + last_ms) as last_ms,
             (array_agg(last_sidecar order by told_ms + last_ms desc nulls last))[1] as last_sidecar
      from weft.propagation_part group by epoch, position) as change
cross join weft.propagation_bound as bound
cross join lateral (
    select max(total) as applied,
           min(ms) filter (where upto >= total * 0.50) as p50,
           min(ms) filter (where upto >= total * 0.99) as p99,
           sum(sidecars) filter (where ms <= bound.bound_ms) as in_time
    from (select part.told_ms + at.applied_ms as ms, at.sidecars,
                 sum(at.sidecars) over (order by part.told_ms + at.applied_ms) as upto,
                 sum(at.sidecars) over ()                                      as total
          from weft.propagation_part as part
          cross join lateral unnest(part.applied_ms, part.sidecars) as at (applied_ms, sidecars)
          where part.epoch = change.epoch and part.position = change.position) as ranked) as spread;
comment on view status.propagation is
    'The way of each version that changed something for sidecars, from the log into them; of the last day, written every second, as of at most status.controllers.known_within_ms ago. Sidecars that first joined with it are not in it.';
comment on column status.propagation.version is 'The version, <epoch>.<position>: what sidecars were told to run.';
comment on column status.propagation.position is 'The event that made it.';
comment on column status.propagation.event is 'What that was; null if it is in sealed history.';
comment on column status.propagation.scope is 'Its scope.';
comment on column status.propagation.actor is 'Who caused it.';
comment on column status.propagation.appended_at is 'When it was recorded, just before its batch was flushed. All other times count from here.';
comment on column status.propagation.folded_ms is 'Until the first controller had folded it.';
comment on column status.propagation.published_ms is 'Until the first controller told its sidecars.';
comment on column status.propagation.applied_p50_ms is 'Until half of those sidecars ran it that do by now.';
comment on column status.propagation.applied_p99_ms is 'Until 99 of 100 of those ran it that do by now.';
comment on column status.propagation.applied_last_ms is 'Until the last of them ran it.';
comment on column status.propagation.last_sidecar is 'Which one that was.';
comment on column status.propagation.interested is 'How many sidecars it changed something for.';
comment on column status.propagation.applied is 'How many of them said that they run it, or something newer.';
comment on column status.propagation.within_bound is 'How many of these did within the mesh''s propagation bound.';

grant select on weft.controller, weft.class_ack, weft.propagation, weft.propagation_bound, weft.propagation_part,
    weft.sidecar_state, status.controllers, status.stale, status.propagation to weft_reader, weft_projector;
grant insert, update, delete on weft.controller, weft.class_ack, weft.propagation to weft_projector;
