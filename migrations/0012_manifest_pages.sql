-- A manifest's hash is that of its pages' hashes, and what it lists follows from its class and the shards beside it: stored
-- once more, every class that sees the whole mesh would write the whole list again with every change of anything.

alter table weft.class_manifest drop column body;
comment on table weft.class_manifest is 'The newest manifest of each interest class: which one it is. It lists the shards of the service''s inbound policy, of its upstreams'' endpoints, and of the trust bundle.';
comment on column weft.class_manifest.hash is 'Names its content: SHA-256 of the hashes of its pages, which are runs of its entries.';
