//! What this controller's sidecars run, and the fewest rows that tell it. Pure.
//!
//! A sidecar **goes with its class** if it is subscribed, refuses nothing, and runs at least what all such sidecars of its class
//! run: the class's row says that for all of them, so that a change which ten thousand sidecars share is one row. Who hangs
//! back holds up its class for [`SETTLED_AFTER`] looks, and then **goes alone**, with a row of its own, until it has caught up.
//!
//! What the rows say was true when they were planned: nobody is said to run more than it does, and once nothing changes for
//! [`SETTLED_AFTER`] looks, everybody is said to run exactly what it does. A property test holds that against what was said.

use std::collections::{BTreeMap, BTreeSet};
use weft_model::{ConfigVersion, InstanceId};
use weft_projector::{Ack, ClassAck};
use weft_routing::ClassId;

/// Looks after which somebody who has not followed the others goes alone.
pub(super) const SETTLED_AFTER: usize = 2;

/// Streams that one sidecar may have open: one, and for a moment one more for each time it broke off without a word.
const STREAMS_PER_SIDECAR_MAX: usize = 8;

/// See the module's documentation. Bounded by the sidecars that talk to this controller: an entry goes when its sidecar has
/// left and that is written.
#[derive(Debug, Default)]
pub(super) struct Fleet {
    sidecars: BTreeMap<InstanceId, Sidecar>,
    classes: BTreeMap<ClassId, Class>,
    /// Whether a look may find something to write.
    changed: bool,
}

#[derive(Debug, Default)]
struct Sidecar {
    /// Streams that it holds open. A reconnecting sidecar may have two for a moment.
    streams: usize,
    /// What it said, and the class that it is in.
    ack: Ack,
    /// Its row, if it is known; its class only if it goes with that.
    written: Option<Ack>,
}

#[derive(Debug, Default)]
struct Class {
    /// What its row says.
    written: Option<ConfigVersion>,
    /// The newest version that one of its sidecars ran, at each of the last looks.
    newest: [ConfigVersion; SETTLED_AFTER],
}

/// What is to be written, all of it at once: a class's row is wrong without those of the sidecars that it leaves behind.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Plan {
    pub(super) sidecars: Vec<(InstanceId, Ack)>,
    pub(super) classes: Vec<ClassAck>,
}

impl Plan {
    pub(super) fn is_empty(&self) -> bool {
        self.sidecars.is_empty() && self.classes.is_empty()
    }
}

/// Where a class stands at a look.
struct Standing {
    /// What all that go with it run.
    applied: ConfigVersion,
    newest: ConfigVersion,
    took_ms: Option<u32>,
}

impl Sidecar {
    /// Its class and what it runs, if it may go with that.
    fn may_follow(&self) -> Option<(ClassId, ConfigVersion)> {
        let Ack { connected, applied, error, class, .. } = &self.ack;
        let (version, _) = applied.filter(|_| *connected && error.is_none())?;
        Some(((*class)?, version))
    }

    /// Whether its row, as it is, tells less or more than `wanted`.
    fn is_wrong(&self, wanted: &Ack) -> bool {
        let Some(written) = &self.written else { return true };
        let said = (&written.connected, &written.error, &written.class);
        if said != (&wanted.connected, &wanted.error, &wanted.class) {
            return true;
        }
        // With the class, only a row that says more than is true is wrong.
        let version = |ack: &Ack| ack.applied.map(|(version, _)| version);
        if wanted.class.is_some() {
            version(written) > version(wanted)
        } else {
            version(written) != version(wanted)
        }
    }
}

impl Fleet {
    fn sidecar(&mut self, instance: &InstanceId) -> &mut Sidecar {
        self.changed = true;
        self.sidecars.entry(instance.clone()).or_default()
    }

    /// A sidecar opens a stream. False if it has enough of them.
    pub(super) fn open_stream(&mut self, instance: &InstanceId) -> bool {
        let sidecar = self.sidecar(instance);
        if sidecar.streams == STREAMS_PER_SIDECAR_MAX {
            return false;
        }
        sidecar.streams += 1;
        sidecar.ack.connected = true;
        true
    }

    /// One of its streams ended.
    pub(super) fn end_stream(&mut self, instance: &InstanceId) {
        let sidecar = self.sidecar(instance);
        sidecar.streams = sidecar.streams.saturating_sub(1);
        sidecar.ack.connected = sidecar.streams > 0;
    }

    /// All streams ended.
    pub(super) fn end_all(&mut self) {
        self.changed = true;
        for sidecar in self.sidecars.values_mut() {
            sidecar.streams = 0;
            sidecar.ack.connected = false;
        }
    }

    /// A sidecar says something of itself. Returns what it had said before that it runs.
    pub(super) fn say(
        &mut self,
        instance: &InstanceId,
        class: Option<ClassId>,
        edit: impl FnOnce(&mut Ack),
    ) -> Option<ConfigVersion> {
        let ack = &mut self.sidecar(instance).ack;
        let before = ack.applied.map(|(version, _)| version);
        edit(ack);
        ack.class = class;
        before
    }

    /// How many are subscribed.
    pub(super) fn subscribed(&self) -> usize {
        self.sidecars.values().filter(|sidecar| sidecar.streams > 0).count()
    }

    /// Looks at who said what, and says what is to be written.
    pub(super) fn plan(&mut self) -> Plan {
        if !std::mem::take(&mut self.changed) {
            return Plan::default();
        }
        let mut standings = self.standings();
        let mut plan = Plan::default();
        for (instance, sidecar) in &self.sidecars {
            let standing = sidecar.may_follow().and_then(|(class, applied)| {
                standings.get_mut(&class).filter(|standing| standing.applied <= applied)
            });
            let mut wanted = sidecar.ack.clone();
            match standing {
                Some(standing) => standing.took_ms = standing.took_ms.max(wanted.took_ms),
                None => wanted.class = None,
            }
            if sidecar.is_wrong(&wanted) {
                plan.sidecars.push((instance.clone(), wanted));
            }
        }
        for (class, Standing { applied, newest, took_ms }) in standings {
            let known = self.classes.entry(class).or_default();
            known.newest.rotate_right(1);
            known.newest[0] = newest;
            // Somebody is ahead of the others: in some looks these have followed, or go alone.
            self.changed |= newest > applied;
            if known.written != Some(applied) {
                plan.classes.push(ClassAck { class, applied, took_ms });
            }
        }
        plan
    }

    /// Where classes stand. What a class's row says never falls: who runs less than it, goes alone.
    fn standings(&self) -> BTreeMap<ClassId, Standing> {
        let mut standings = BTreeMap::<ClassId, Standing>::new();
        let followers = self.sidecars.values().filter_map(Sidecar::may_follow);
        for (class, applied) in followers {
            let known = self.classes.get(&class);
            let settled = known.map_or(ConfigVersion::default(), |class| class.newest[SETTLED_AFTER - 1]);
            if applied < settled.max(known.and_then(|class| class.written).unwrap_or_default()) {
                continue;
            }
            let first = Standing { applied, newest: applied, took_ms: None };
            let standing = standings.entry(class).or_insert(first);
            standing.applied = standing.applied.min(applied);
            standing.newest = standing.newest.max(applied);
        }
        standings
    }

    /// All of a plan is written.
    pub(super) fn written(&mut self, plan: Plan) {
        for ClassAck { class, applied, .. } in plan.classes {
            if let Some(known) = self.classes.get_mut(&class) {
                known.written = Some(applied);
            }
        }
        for (instance, row) in plan.sidecars {
            let Some(sidecar) = self.sidecars.get_mut(&instance) else { continue };
            // Who left and was written needs no memory any more, unless it said something meanwhile.
            let unchanged = Ack { class: None, ..sidecar.ack.clone() } == row;
            sidecar.written = Some(row);
            if sidecar.streams == 0 && unchanged {
                self.sidecars.remove(&instance);
            }
        }
    }

    /// Whether a plan is written is not known, nor whether what was written before still is: a database that fails may come
    /// back without its last moments. So all of it is written again.
    pub(super) fn lost(&mut self) {
        self.changed = true;
        self.classes.clear();
        self.sidecars.values_mut().for_each(|sidecar| sidecar.written = None);
    }

    /// Forgets classes that no sidecar is in.
    pub(super) fn forget_classes(&mut self) {
        let in_use: BTreeSet<_> = self.sidecars.values().filter_map(|it| it.ack.class).collect();
        self.classes.retain(|class, _| in_use.contains(class));
    }
}

#[cfg(test)]
mod tests;
