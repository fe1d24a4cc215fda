//! A snapshot with what the data path counts beside it: live connections of each endpoint, whose turn it is, who is ejected, and the
//! tables of services that are balanced by source. Made once for each snapshot; counts of services and endpoints that stay are
//! carried over, and a service that did not change costs nothing.

mod counts;

use crate::balance::maglev::{self, Table};
use crate::balance::nearness::{self, LEVELS};
use crate::balance::subsets::{self, Round};
use crate::balance::{self, Candidates};
use crate::clock;
use crate::metrics;
use counts::{EndpointCount, Full, Limit, ServiceCount};
pub(crate) use counts::{EndpointView, Load, Way};
use rand::{Rng, RngExt};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use weft_model::health::Health;
use weft_model::membership::Locality;
use weft_model::traffic::{Balance, Nearness, SUBSETS_MAX, Subset, TrafficPolicy};
use weft_model::{InstanceId, Name, ServiceName};
use weft_routing::Snapshot;
use weft_routing::shard::{Endpoint, EndpointsShard};

/// How often a choice is made anew because another thread took what it was about to take: its limit's last place, or the
/// trial of an endpoint. Each time somebody else got on, so more are not needed but in a storm.
const CHOICES_MAX: usize = 8;

/// Levels that a service has at most: those of its subsets, and of who belongs to none.
const PLACES: usize = (SUBSETS_MAX + 1) * LEVELS;

/// Places in which it is counted whose turn it is; levels of two subsets have one each. Whoever has more shares some, and turns are then not quite
/// even.
const TURNS: usize = 2 * LEVELS;

/// What connections are routed by.
#[derive(Debug)]
pub(crate) struct Routes {
    pub(crate) snapshot: Arc<Snapshot>,
    services: BTreeMap<ServiceName, Arc<Counts>>,
}

#[derive(Debug)]
struct Counts {
    service: Arc<ServiceCount>,
    /// In the order of the shard's endpoints.
    endpoints: Vec<Arc<EndpointCount>>,
    /// The service's subsets in the policy's order, and behind them who belongs to none; one if it has no subsets.
    groups: Vec<Group>,
    /// The weights of the subsets that somebody belongs to who takes connections, and their turns; 0 for the others.
    weights: Vec<u16>,
    round: Round,
}

/// Endpoints of one subset.
#[derive(Debug)]
struct Group {
    /// Which one; one more than there are for who belongs to none.
    index: usize,
    /// Those that take connections by how near they are, the nearest first; one level if all are alike.
    levels: Vec<Level>,
    /// What each level takes, and by how many ejections and returns that is ([`ServiceCount::ejections`]): in the upper half one more than
    /// those, in the lower ten bits for each.
    shares: AtomicU64,
}

/// Endpoints that are as near as each other.
#[derive(Debug)]
struct Level {
    /// How near, if that matters.
    near: Option<Near>,
    /// In which subset they are, if the service has some.
    subset: Option<Name>,
    /// Whose turn it is there is counted in this place.
    place: usize,
    /// Which ones take connections, in the order of the shard's endpoints.
    open: Vec<usize>,
    /// Of how many it is known whether they can.
    of: usize,
    /// Of those that take connections, for [`Balance::Maglev`].
    table: Option<Table>,
}

/// How near an endpoint is, the nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Near {
    Zone,
    Region,
    Elsewhere,
}

impl Near {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Zone => "zone",
            Self::Region => "region",
            Self::Elsewhere => "elsewhere",
        }
    }

    /// How near `there` is for a policy that makes a difference of it.
    fn of(prefer: Nearness, home: &Locality, there: &Locality) -> Option<Self> {
        match prefer {
            Nearness::Any => None,
            Nearness::Zone if home.shares_zone(there) => Some(Self::Zone),
            Nearness::Zone | Nearness::Region if home.shares_region(there) => Some(Self::Region),
            Nearness::Zone | Nearness::Region => Some(Self::Elsewhere),
        }
    }
}

/// An endpoint that was chosen, counted as one more connection until its load is dropped.
#[derive(Debug)]
pub(crate) struct Chosen<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) load: Load,
    pub(crate) way: Way,
    /// How near it is, if that mattered.
    pub(crate) near: Option<Near>,
    /// Which subset it belongs to.
    pub(crate) subset: Option<&'a Name>,
}

/// Why no endpoint was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unchosen {
    /// Every one was tried, or there is none.
    NoneLeft,
    /// A circuit limit is reached.
    Full(Full),
}

impl Routes {
    /// Routes of `own`'s sidecar, which runs at `home`, for a snapshot that follows `previous`.
    pub(crate) fn new(
        snapshot: &Arc<Snapshot>,
        previous: Option<&Self>,
        own: &InstanceId,
        home: &Locality,
    ) -> Self {
        let now = clock::uptime_ms();
        let services = snapshot.endpoints.iter().map(|(service, shard)| {
            let known = previous.and_then(|previous| {
                Some((&**previous.snapshot.endpoints.get(service)?, previous.services.get(service)?))
            });
            if let Some((former, counts)) = known
                && std::ptr::eq(former, &raw const **shard)
            {
                // Nothing is counted anew for a service that did not change, however many there are.
                return (service.clone(), Arc::clone(counts));
            }
            let known = known.map(|(shard, counts)| (shard, &**counts));
            (service.clone(), Arc::new(Counts::new(shard, known, own, home, now)))
        });
        Self { services: services.collect(), snapshot: Arc::clone(snapshot) }
    }

    /// Says which services are in panic that were not before, and which are not any more.
    pub(crate) fn tell_panic(&self, previous: Option<&Self>) {
        let in_panic = |routes: &Self| -> BTreeSet<ServiceName> {
            let endpoints = routes.snapshot.endpoints.iter();
            endpoints.filter(|(_, shard)| shard.panic).map(|(service, _)| service.clone()).collect()
        };
        let (now, before) = (in_panic(self), previous.map(in_panic).unwrap_or_default());
        metrics::services_in_panic(now.len());
        for service in now.difference(&before) {
            let eligible = self.snapshot.endpoints.get(service).map_or(0, |shard| shard.eligible().count());
            tracing::warn!(%service, eligible, "PANIC: too few endpoints are healthy; connections go to unhealthy ones as well");
        }
        for service in before.difference(&now) {
            tracing::info!(%service, "panic is over: connections go to healthy endpoints only");
        }
    }

    /// Chooses among the endpoints that a service takes connections at, that were not tried yet and that have room; those that are
    /// ejected only if no others are left.
    pub(crate) fn choose(
        &self,
        service: &ServiceName,
        policy: &TrafficPolicy,
        source: Source<'_>,
        tried: &[Name],
        rng: &mut impl Rng,
    ) -> Result<Chosen<'_>, Unchosen> {
        let shard = self.snapshot.endpoints.get(service).ok_or(Unchosen::NoneLeft)?;
        let counts = self.services.get(service).ok_or(Unchosen::NoneLeft)?;
        if tried.is_empty() {
            counts.service.begun();
        }
        let now = clock::uptime_ms();
        let keyed = policy.balance == Balance::Maglev || policy.sticky_sources;
        let source = keyed.then(|| source.key());
        let order = counts.order(policy, source, tried.is_empty(), rng);
        let Some(first) = order.first() else { return Err(Unchosen::NoneLeft) };
        let source = source.unwrap_or_default();
        let turn = counts.service.turns[first.place].fetch_add(1, Ordering::Relaxed);
        let last_resort = !policy.outlier_detection.enabled;
        let mut view = View { shard, counts, policy, level: first, tried, last_resort, now };
        let mut full = None;
        for choice in 0..CHOICES_MAX {
            // Whoever loses so many races for a trial does without one.
            view.last_resort |= choice >= CHOICES_MAX / 2;
            // One of the level that it is to be; if none there fits, of the next one where one does.
            let picked = order.iter().find_map(|level| {
                view.level = level;
                let picked = balance::pick(policy.balance, &view, turn, level.table.as_ref(), source, rng)?;
                Some((level, picked))
            });
            let Some((level, picked)) = picked else {
                if view.last_resort {
                    break;
                }
                view.last_resort = true;
                continue;
            };
            let (index, near, subset) = (level.open[picked], level.near, level.subset.as_ref());
            let added = Load::add(
                &counts.endpoints[index],
                &counts.service,
                &policy.limits,
                policy.outlier_detection,
                now,
            );
            match added.map(|mut load| (load.begin(view.last_resort), load)) {
                Ok((Some(way), load)) => {
                    return Ok(Chosen { endpoint: &shard.endpoints[index], load, way, near, subset });
                }
                Ok((None, _)) => {}
                Err(Limit::Service(limit)) => return Err(Unchosen::Full(limit)),
                Err(Limit::Endpoint(limit)) => full = Some(limit),
            }
        }
        // Whoever was not tried has no room, if there is anybody.
        let full = full.or_else(|| {
            order.iter().find_map(|level| {
                view.level = level;
                let mut untried = (0..view.count()).filter(|index| !view.was_tried(*index));
                untried.find_map(|index| view.endpoint(index).full(&policy.limits))
            })
        });
        Err(full.map_or(Unchosen::NoneLeft, Unchosen::Full))
    }

    /// Whether a service has an endpoint that takes connections besides these.
    pub(crate) fn has_untried(&self, service: &ServiceName, tried: &[Name]) -> bool {
        let untried = |shard: &Arc<EndpointsShard>| {
            let mut endpoints = shard.endpoints.iter();
            endpoints.any(|endpoint| shard.takes(endpoint) && !tried.contains(&endpoint.instance))
        };
        self.snapshot.endpoints.get(service).is_some_and(untried)
    }

    /// How many endpoints are ejected or returning.
    pub(crate) fn ejected(&self) -> usize {
        let endpoints = self.services.values().flat_map(|counts| &counts.endpoints);
        endpoints.filter(|endpoint| endpoint.is_ejected()).count()
    }

    /// What is counted of a service's endpoints, in the shard's order.
    pub(crate) fn views(&self, service: &ServiceName) -> impl Iterator<Item = EndpointView> {
        let now = clock::uptime_ms();
        let endpoints = self.services.get(service).into_iter().flat_map(|counts| &counts.endpoints);
        endpoints.map(move |endpoint| endpoint.view(now))
    }
}

/// Whose connection it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    pub(crate) address: IpAddr,
    pub(crate) own: &'a InstanceId,
}

impl Source<'_> {
    fn key(self) -> u64 {
        maglev::source(self.address, &self.own.to_string())
    }
}

impl Counts {
    fn new(
        shard: &EndpointsShard,
        known: Option<(&EndpointsShard, &Self)>,
        own: &InstanceId,
        home: &Locality,
        now: u64,
    ) -> Self {
        let (policy, _) = shard.traffic_for(&own.service);
        // So few are healthy that it is no matter where.
        let prefer = if shard.panic { Nearness::Any } else { policy.locality.prefer };
        let mut groups: BTreeMap<usize, BTreeMap<Option<Near>, Level>> = BTreeMap::new();
        let endpoints = shard.endpoints.iter().enumerate().map(|(index, endpoint)| {
            let former = known.and_then(|(former, counts)| {
                let same = |old: &Endpoint| old.instance.cmp(&endpoint.instance);
                let index = former.endpoints.binary_search_by(same).ok()?;
                Some((&former.endpoints[index], counts.endpoints.get(index)?))
            });
            // What runs at another address is another process, and nothing is known of it.
            let carried = former.filter(|(former, _)| former.address == endpoint.address);
            let count = carried.map(|(_, count)| Arc::clone(count)).unwrap_or_default();
            // All of a service that was not known before are as warm as each other.
            let was_eligible = carried.is_some_and(|(former, _)| former.eligible());
            if known.is_some() && endpoint.eligible() && !was_eligible {
                count.became_eligible(now);
            }
            let near = Near::of(prefer, home, &endpoint.locality);
            let group = group_of(&policy.subsets, endpoint);
            let level = || Level {
                near,
                subset: policy.subsets.get(group).map(|subset| subset.name.clone()),
                place: (group * LEVELS + near.map_or(0, |near| near as usize)) % TURNS,
                open: Vec::new(),
                of: 0,
                table: None,
            };
            let level = groups.entry(group).or_default().entry(near).or_insert_with(level);
            level.of += usize::from(!endpoint.draining && endpoint.health != Health::Unknown);
            if shard.takes(endpoint) {
                level.open.push(index);
            }
            count
        });
        let endpoints: Vec<_> = endpoints.collect();
        let service = known.map(|(_, counts)| Arc::clone(&counts.service)).unwrap_or_default();
        let mut groups: Vec<_> = groups
            .into_iter()
            .map(|(index, levels)| Group {
                index,
                levels: levels.into_values().collect(),
                shares: AtomicU64::new(0),
            })
            .collect();
        let open = groups.iter().flat_map(|group| &group.levels).flat_map(|level| &level.open);
        *service.members.lock().unwrap_or_else(PoisonError::into_inner) =
            open.map(|index| Arc::clone(&endpoints[*index])).collect();
        if policy.balance == Balance::Maglev {
            for level in groups.iter_mut().flat_map(|group| &mut group.levels) {
                let names = level.open.iter().map(|index| shard.endpoints[*index].instance.as_str());
                level.table = Some(Table::build(names));
            }
        }
        let weight = |group: &Group| {
            let anybody = group.levels.iter().any(|level| !level.open.is_empty());
            policy.subsets.get(group.index).filter(|_| anybody).map_or(0, |subset| subset.weight)
        };
        let weights: Vec<_> = groups.iter().map(weight).collect();
        let round = Round::of(&weights);
        Self { service, endpoints, groups, weights, round }
    }

    /// The levels of all subsets, in the order in which they are looked through: first the subset that the connection goes to, then the
    /// others in case that nobody there fits, those without a weight and those who belong to none last. A source that is to stay where it is
    /// stays in its subset, and at its level as well. What is tried again takes no turn.
    fn order(
        &self,
        policy: &TrafficPolicy,
        source: Option<u64>,
        takes_turn: bool,
        rng: &mut impl Rng,
    ) -> Order<'_> {
        let mut order = Order { levels: [None; PLACES], count: 0 };
        let drawn = match source {
            _ if self.groups.len() == 1 => Some(0),
            // Other bits of it than those that choose endpoint and level.
            Some(source) if policy.sticky_sources => {
                subsets::of_source(&self.weights, source.rotate_left(41))
            }
            _ if takes_turn => self.round.at(self.service.picks.fetch_add(1, Ordering::Relaxed)),
            _ => self.round.at(rng.random_range(0..usize::MAX)),
        };
        let weighty = |index: &usize| self.weights.get(*index).is_some_and(|weight| *weight > 0);
        let others = || (0..self.groups.len()).filter(|index| Some(*index) != drawn);
        let last = others().filter(|index| !weighty(index));
        for index in drawn.into_iter().chain(others().filter(weighty)).chain(last) {
            if let Some(group) = self.groups.get(index) {
                self.order_in(group, policy, source, &mut order, rng);
            }
        }
        order
    }

    /// The levels of a subset, the one first that the connection goes to.
    fn order_in<'a>(
        &self,
        group: &'a Group,
        policy: &TrafficPolicy,
        source: Option<u64>,
        order: &mut Order<'a>,
        rng: &mut impl Rng,
    ) {
        let drawn = if group.levels.len() > 1 {
            // Other bits of it than those that choose the endpoint.
            let roll = source.map_or_else(|| rng.random(), |source| source.rotate_left(24));
            nearness::draw(&self.shares(group, policy), roll).unwrap_or(0)
        } else {
            0
        };
        let others = (0..group.levels.len()).filter(|index| *index != drawn);
        for index in std::iter::once(drawn).chain(others) {
            order.push(group.levels.get(index));
        }
    }

    /// What each level takes. Counted anew only when an endpoint of the service was ejected or has returned.
    fn shares(&self, group: &Group, policy: &TrafficPolicy) -> [u32; LEVELS] {
        const BITS: usize = 10;
        const _: () = assert!(nearness::WHOLE < 1 << BITS && LEVELS * BITS <= 32);
        let as_of = u64::from(self.service.ejections.load(Ordering::Relaxed)) + 1;
        let known = group.shares.load(Ordering::Relaxed);
        if known >> 32 == as_of {
            return std::array::from_fn(|level| {
                u32::try_from(known >> (level * BITS) & ((1 << BITS) - 1)).unwrap_or(nearness::WHOLE)
            });
        }
        let counted: Vec<_> = group.levels.iter().map(|level| self.counted(level, policy)).collect();
        let shares = nearness::shares(&counted, policy.locality.threshold_percent);
        let packed = shares.iter().rev().fold(0, |packed, share| packed << BITS | u64::from(*share));
        group.shares.store(as_of << 32 | packed, Ordering::Relaxed);
        shares
    }

    fn counted(&self, level: &Level, policy: &TrafficPolicy) -> nearness::Level {
        let passed_over =
            |index: &&usize| policy.outlier_detection.enabled && self.endpoints[**index].is_ejected();
        let ejected = level.open.iter().filter(passed_over).count();
        nearness::Level { healthy: level.open.len() - ejected, of: level.of }
    }
}

/// The subset that an endpoint belongs to, by its number; who belongs to none is behind the last.
fn group_of(subsets: &[Subset], endpoint: &Endpoint) -> usize {
    let fits = |subset: &Subset| {
        subset.labels.iter().all(|(key, value)| endpoint.labels.get(key).is_some_and(|has| has == value))
    };
    subsets.iter().position(fits).unwrap_or(subsets.len())
}

/// Levels in the order in which they are looked through.
struct Order<'a> {
    levels: [Option<&'a Level>; PLACES],
    count: usize,
}

impl<'a> Order<'a> {
    fn push(&mut self, level: Option<&'a Level>) {
        if let (Some(level), Some(place)) = (level, self.levels.get_mut(self.count)) {
            *place = Some(level);
            self.count += 1;
        }
    }

    fn first(&self) -> Option<&'a Level> {
        self.levels[0]
    }

    fn iter(&self) -> impl Iterator<Item = &'a Level> {
        self.levels.into_iter().flatten()
    }
}

/// The endpoints of a service as they are chosen among.
struct View<'a> {
    shard: &'a EndpointsShard,
    counts: &'a Counts,
    policy: &'a TrafficPolicy,
    level: &'a Level,
    tried: &'a [Name],
    /// Those that are ejected fit too.
    last_resort: bool,
    now: u64,
}

impl View<'_> {
    fn endpoint(&self, index: usize) -> &EndpointCount {
        &self.counts.endpoints[self.level.open[index]]
    }

    fn was_tried(&self, index: usize) -> bool {
        let endpoint = &self.shard.endpoints[self.level.open[index]];
        self.tried.contains(&endpoint.instance)
    }
}

impl Candidates for View<'_> {
    fn count(&self) -> usize {
        self.level.open.len()
    }

    fn fits(&self, index: usize) -> bool {
        let endpoint = self.endpoint(index);
        (self.last_resort || endpoint.is_sound(self.now))
            && endpoint.full(&self.policy.limits).is_none()
            && !self.was_tried(index)
    }

    fn live(&self, index: usize) -> u64 {
        self.endpoint(index).live()
    }

    fn warmth(&self, index: usize) -> u64 {
        self.endpoint(index).warmth(self.policy.slow_start_ms, self.now)
    }

    fn connect_us(&self, index: usize) -> Option<u64> {
        self.endpoint(index).connect_us(self.now)
    }
}

#[cfg(test)]
mod tests;
