-- What a batch remembers of a command is a hash of it now. The four quarters of the fingerprint, combined by exclusive or, stayed
-- the same when two quarters changed places, and such a change showed only at the batch's end.

create function pg_temp.word(bytes bytea, at integer) returns bit(64) language sql immutable as
    $$ select ('x' || encode(substring(bytes from at for 8), 'hex'))::bit(64) $$;

-- What each mark changes by, rather than marks made anew: one that contradicts its event must go on doing so.
create temporary table term on commit drop as
select position,
       pg_temp.word(fingerprint, 1) # pg_temp.word(fingerprint, 9) # pg_temp.word(fingerprint, 17) # pg_temp.word(fingerprint, 25)
           # command_events::bigint::bit(64)
           # pg_temp.word(sha256(fingerprint || int4send(command_events)), 1) as change
from weft.event where fingerprint is not null;
alter table term add primary key (position);
analyze term;

alter table weft.log_batch disable trigger append_only;
update weft.log_batch as batch set marks = fresh.marks
from (select batch.last_position,
             string_agg(int8send((pg_temp.word(batch.marks, (8 * (at.position - batch.first_position) + 1)::integer)
                                  # coalesce(term.change, 0::bigint::bit(64)))::bigint), ''::bytea order by at.position) as marks
      from weft.log_batch as batch
      cross join lateral generate_series(batch.first_position, batch.last_position) as at (position)
      left join term on term.position = at.position
      -- Of what is sealed no fingerprint is known, and its marks are asked for no more.
      where batch.last_position > (select coalesce(max(last_position), 0) from weft.log_segment)
      group by batch.last_position) as fresh
where fresh.last_position = batch.last_position;
alter table weft.log_batch enable always trigger append_only;

comment on column weft.log_batch.marks is
    'Eight bytes for each event, to tell which one was changed: the first of its hash; on the first event of a command combined by exclusive or with the first of the SHA-256 of its fingerprint and its number of events (four bytes).';
