-- Where a start may go on from, instead of folding the log from its first event. Derived: the log is the truth, and whoever
-- verifies it does not look here for what it says.

create table weft.fold_checkpoint (
    position     bigint      primary key check (position > 0),
    epoch        bigint      not null check (epoch > 0),
    log_hash     bytea       not null check (octet_length(log_hash) = 32),
    fold_version integer     not null check (fold_version > 0),
    body         bytea       not null,
    body_hash    bytea       not null check (octet_length(body_hash) = 32),
    made_at      timestamptz not null
);
-- Compressed already.
alter table weft.fold_checkpoint alter column body set storage external;

comment on table weft.fold_checkpoint is
    'What the log folds to at a few recent positions, so that a start reads its end only. May be emptied at any time.';
comment on column weft.fold_checkpoint.position is 'The last event that is folded into it.';
comment on column weft.fold_checkpoint.epoch is 'Epoch of that event.';
comment on column weft.fold_checkpoint.log_hash is 'Chain hash of that event: the checkpoint is of the log that has it there, and of no other.';
comment on column weft.fold_checkpoint.fold_version is 'Which fold made it; another one does not read it.';
comment on column weft.fold_checkpoint.body is 'The fold''s state in canonical bytes, compressed with zstd.';
comment on column weft.fold_checkpoint.body_hash is 'SHA-256 of body.';
comment on column weft.fold_checkpoint.made_at is 'When it was written, by the database clock.';

grant select on weft.fold_checkpoint to weft_reader;
grant select, insert, delete on weft.fold_checkpoint to weft_projector;
