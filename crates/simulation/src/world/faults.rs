//! What goes wrong, and when: drawn from the seed before anything happens.

use rand::RngExt;
use rand::rngs::SmallRng;
use std::time::Duration;

use super::wishes::instance_id;
use super::{Controller, Event, Link, Sidecar, World, say};

/// How long a controller may remember what the log lost, and answer out of that: until its tail looks, and it was started anew.
const REMEMBERED: Duration = Duration::from_secs(12);

/// How long an operator waits for a finding, or for it to pass, after a sidecar was seen to have more than the log.
const UNPROVEN: Duration = Duration::from_secs(15);

/// What a seed stands for, beside its chance.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) services: usize,
    instances: usize,
    controllers: usize,
    /// Faults go on until the end: then only what must never happen is looked at.
    pub(crate) endless: bool,
    /// When faults end, if they do.
    pub(crate) calm: Duration,
    pub(crate) changes_until: Duration,
    /// Between two changes.
    pub(crate) pace: (Duration, Duration),
    /// How many messages are slow, and how many are lost.
    pub(crate) slow: f64,
    pub(crate) loss: f64,
    /// Notices are lost, doubled and overtaken while their stream goes on.
    pub(crate) wild: bool,
    faults: usize,
    /// Whether backups are restored.
    rewinds: bool,
    /// A backup took the place of the log.
    pub(crate) restored: bool,
}

/// Something that breaks, or is mended.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    StartController(usize),
    EndController(usize, Duration),
    PauseController(usize, Duration),
    StartSidecar(usize),
    EndSidecar(usize, Duration, bool),
    SlowDisk(usize, Duration),
    FullDisk(usize, Duration),
    Cut(Vec<Link>, Duration),
    Mend(Vec<Link>),
    StallDatabase(Duration),
    EndDatabase(Duration),
    Backup,
    Restore {
        log_alone: bool,
        down: Duration,
    },
    /// People see to it that what the mesh rests on is there.
    Found,
    Calm,
}

impl Plan {
    pub(crate) fn draw(rng: &mut SmallRng) -> Self {
        let millis = |rng: &mut SmallRng, range| Duration::from_millis(rng.random_range(range));
        let calm = millis(rng, 6_000..18_000);
        let least = millis(rng, 20..150);
        Self {
            services: rng.random_range(2..=4),
            instances: rng.random_range(2..=5),
            controllers: rng.random_range(1..=3),
            endless: rng.random_bool(0.2),
            calm,
            changes_until: calm + Duration::from_secs(1),
            pace: (least, least * 6),
            slow: *[0.0, 0.02, 0.1].get(rng.random_range(0..3)).unwrap_or(&0.0),
            loss: *[0.0, 0.01, 0.05].get(rng.random_range(0..3)).unwrap_or(&0.0),
            wild: rng.random_bool(0.3),
            faults: rng.random_range(2..14),
            rewinds: rng.random_bool(0.4),
            restored: false,
        }
    }
}

impl World {
    /// Everybody starts, and what will go wrong is set.
    pub(super) fn begin(&mut self) {
        let plan = self.plan.clone();
        say!(self, "{plan:?}");
        let now = self.instant();
        self.controllers = (0..plan.controllers).map(|_| Controller::new(None, 0)).collect();
        self.sidecars = (0..plan.instances)
            .map(|instance| Sidecar::new(instance_id(instance % plan.services, instance), now))
            .collect();
        for controller in 0..plan.controllers {
            self.controllers[controller].up = false;
            self.after(Duration::ZERO, Event::Fault(Fault::StartController(controller)));
        }
        for sidecar in 0..plan.instances {
            let wait = self.between(Duration::from_millis(50), Duration::from_secs(2));
            self.after(wait, Event::Fault(Fault::StartSidecar(sidecar)));
        }
        self.after(Duration::from_millis(300), Event::Command);
        self.after(Duration::from_secs(1), Event::Peers);
        self.after(Duration::from_secs(1), Event::Operator);
        self.found();
        for _ in 0..plan.faults {
            let at = self.between(Duration::from_millis(500), plan.calm);
            let fault = self.draw_fault();
            self.after(at, Event::Fault(fault));
        }
        if plan.rewinds {
            let at = self.between(Duration::from_secs(1), plan.calm / 2);
            self.after(at, Event::Fault(Fault::Backup));
            let down = self.between(Duration::from_millis(20), Duration::from_secs(2));
            let (restored, log_alone) = (self.between(at, plan.calm), self.chance(0.5));
            self.after(restored, Event::Fault(Fault::Restore { log_alone, down }));
            if self.chance(0.5) {
                // An epoch that the backup does not know: the next one has its number.
                let (ends, down) = (self.between(at, restored), self.between(Duration::ZERO, down));
                self.after(ends, Event::Fault(Fault::EndDatabase(down)));
            }
        }
        if !plan.endless {
            self.after(plan.calm, Event::Fault(Fault::Calm));
        }
    }

    fn draw_fault(&mut self) -> Fault {
        let (controllers, sidecars) = (self.controllers.len(), self.sidecars.len());
        let (controller, sidecar) =
            (self.rng.random_range(0..controllers), self.rng.random_range(0..sidecars));
        let short = self.between(Duration::from_millis(50), Duration::from_secs(1));
        let long = self.between(Duration::from_millis(300), Duration::from_secs(6));
        match self.rng.random_range(0..100) {
            0..16 => Fault::EndController(controller, short * 2),
            16..32 => Fault::PauseController(controller, long),
            32..48 => {
                let spoiled = self.chance(0.15);
                Fault::EndSidecar(sidecar, short * 2, spoiled)
            }
            48..56 => Fault::SlowDisk(sidecar, long),
            56..60 => Fault::FullDisk(sidecar, long),
            60..76 => {
                let (there, back) = self.one_or_both();
                let links =
                    [there.then_some(Link::Ask(controller)), back.then_some(Link::Answer(controller))];
                Fault::Cut(links.into_iter().flatten().collect(), long)
            }
            76..90 => {
                let (there, back) = self.one_or_both();
                let everybody = self.chance(0.5);
                let mut links = Vec::new();
                for controller in (0..controllers).filter(|it| everybody || *it == controller) {
                    links.extend(there.then_some(Link::Request(sidecar, controller)));
                    links.extend(back.then_some(Link::Reply(sidecar, controller)));
                }
                Fault::Cut(links, long)
            }
            90..95 => Fault::StallDatabase(short * 3),
            _ => Fault::EndDatabase(short),
        }
    }

    fn one_or_both(&mut self) -> (bool, bool) {
        match self.rng.random_range(0..3) {
            0 => (true, false),
            1 => (false, true),
            _ => (true, true),
        }
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::StartController(controller) => {
                if !self.controllers[controller].up {
                    self.start_controller(controller);
                }
            }
            Fault::EndController(controller, down) => {
                if self.controllers[controller].up {
                    self.end_controller(controller);
                    self.after(down, Event::Fault(Fault::StartController(controller)));
                }
            }
            Fault::PauseController(controller, wait) => {
                say!(self, "c{controller} is paused for {wait:?}");
                self.controllers[controller].paused = self.now + wait;
            }
            Fault::StartSidecar(sidecar) => {
                if !self.sidecars[sidecar].up {
                    self.start_sidecar(sidecar);
                }
            }
            Fault::EndSidecar(sidecar, down, spoiled) => {
                if self.sidecars[sidecar].up {
                    self.end_sidecar(sidecar);
                    if spoiled {
                        self.spoil_disk(sidecar);
                    }
                    self.after(down, Event::Fault(Fault::StartSidecar(sidecar)));
                }
            }
            Fault::SlowDisk(sidecar, wait) => self.sidecars[sidecar].disk_slow = self.now + wait,
            Fault::FullDisk(sidecar, wait) => self.sidecars[sidecar].disk_fails = self.now + wait,
            Fault::Cut(links, wait) => {
                say!(self, "cut for {wait:?}: {links:?}");
                self.cuts.extend(links.iter().copied());
                self.after(wait, Event::Fault(Fault::Mend(links)));
            }
            Fault::Mend(links) => {
                say!(self, "mended: {links:?}");
                links.iter().for_each(|link| {
                    self.cuts.remove(link);
                });
            }
            Fault::StallDatabase(wait) => {
                say!(self, "the database stalls for {wait:?}");
                self.stalled = self.now + wait;
            }
            Fault::EndDatabase(down) => {
                say!(self, "the database is killed, for {down:?}");
                self.database_ends(down);
            }
            Fault::Backup => {
                say!(self, "a backup, up to {}", self.database.tail().position);
                self.backups.push(self.database.tables.clone());
            }
            Fault::Restore { log_alone, down } => {
                say!(self, "a backup is restored, of the log alone: {log_alone}");
                self.plan.restored = true;
                self.database_ends(down);
                self.database_is_restored(self.backups.len() - 1, log_alone);
            }
            Fault::Found => self.found(),
            Fault::Calm => self.calm(),
        }
    }

    /// All faults end.
    fn calm(&mut self) {
        say!(self, "calm");
        self.cuts.clear();
        (self.plan.slow, self.plan.loss, self.plan.wild) = (0.0, 0.0, false);
        (self.stalled, self.down) = (self.now, self.now);
        for controller in 0..self.controllers.len() {
            self.controllers[controller].paused = self.now;
            if !self.controllers[controller].up {
                self.start_controller(controller);
            }
        }
        for sidecar in 0..self.sidecars.len() {
            (self.sidecars[sidecar].disk_slow, self.sidecars[sidecar].disk_fails) = (self.now, self.now);
            if !self.sidecars[sidecar].up {
                self.start_sidecar(sidecar);
            }
        }
        // What the mesh rests on may be among what was lost; and again when nobody remembers more than the log has.
        self.found();
        self.after(REMEMBERED, Event::Fault(Fault::Found));
    }

    /// The status shows a sidecar that has more than the log, or something else at the same version.
    pub(super) fn see_beyond(&mut self) {
        self.beyond = Some((self.beyond.map_or(self.now, |(first, _)| first), self.now));
    }

    /// Somebody looks at what the log's history needs: goes on without what was lost, starts what has to be started anew.
    pub(super) fn operate(&mut self) {
        let wait = self.between(Duration::from_millis(500), Duration::from_secs(3));
        self.after(wait, Event::Operator);
        if self.now < self.down {
            return;
        }
        let standing = self.database.standing();
        let newest = standing.iter().map(|finding| finding.id).max();
        if let Some(upto) = newest {
            if self.looked_at == Some(upto) {
                let adopted = self.database.adopt(upto, self.now);
                say!(self, "an operator adopts the log as it is: {adopted}");
            }
            (self.looked_at, self.beyond) = (newest, None);
            return;
        }
        // Nobody can prove what was lost, so there is nothing to adopt; but a new epoch is above it all the same.
        let (first, last) = self.beyond.unwrap_or((self.now, Duration::ZERO));
        if self.now - first > UNPROVEN && self.now - last < UNPROVEN {
            say!(self, "an operator restarts the database, for sidecars that have more than the log");
            self.beyond = None;
            self.database_ends(Duration::from_millis(200));
            // It opens with the next change.
            self.want_something();
        }
        if self.looked_at.take().is_some() {
            // Among what was lost may be what the mesh rests on; controllers announce their root after a decision, too.
            self.found();
        }
        for controller in 0..self.controllers.len() {
            let it = &self.controllers[controller];
            if it.up && it.faulted && self.chance(0.3) {
                say!(self, "an operator ends c{controller}, which cannot go on");
                self.end_controller(controller);
                self.after(Duration::from_millis(300), Event::Fault(Fault::StartController(controller)));
            }
        }
    }
}
