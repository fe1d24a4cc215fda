//! The `traffic` scope: how connections to a service are spread and opened, what is kept away from endpoints that fail, and how
//! long connections may last.
//!
//! Every field of a policy is written into its event, those with their default value too: a default may be chosen better
//! one day, and what was recorded keeps meaning what it meant.

mod past;

use crate::event::event_family;
use crate::id::Name;
use crate::membership;
use crate::rejection::Rejection;
use crate::scope::{Scope, TrafficScope};
use past::{TrafficPolicySetV1, TrafficPolicySetV2};
pub(crate) use past::{TrafficPolicyV1, TrafficPolicyV2};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

/// Longest connect timeout, in milliseconds: past it an application has given up long ago.
pub const CONNECT_TIMEOUT_MS_MAX: u32 = 60_000;
/// Most further endpoints that one connection may be tried on.
pub const CONNECT_RETRIES_MAX: u8 = 10;
/// Longest first pause before a retry, in milliseconds: with ten retries that each pause ten times as long, an application
/// waits for less than two minutes.
pub const BACKOFF_MS_MAX: u32 = 1_000;
/// Most retries that a budget may allow each second, whatever is opened: more than a sidecar opens.
pub const BUDGET_MIN_PER_SECOND_MAX: u32 = 10_000;
/// Longest slow start, in milliseconds: an endpoint that is not warm after a quarter of an hour never will be.
pub const SLOW_START_MS_MAX: u32 = 900_000;
/// Bounds of circuit limits. None would be reached above: it is several times what a sidecar holds.
pub const LIMIT: RangeInclusive<u32> = 1..=1_000_000;
/// Most subsets of a service: a person can still tell which version runs where.
pub const SUBSETS_MAX: usize = 8;
/// Most labels of a subset.
pub const SUBSET_LABELS_MAX: usize = 4;
/// Largest weight of a subset: finer than a tenth of a percent nobody can tell.
pub const WEIGHT_MAX: u16 = 1_000;
/// Most failures in a row before an endpoint is ejected: more are no pattern any more, but an endpoint that does not work.
pub const OUTLIER_FAILURES_MAX: u8 = 100;
/// Bounds of the shortest ejection, in milliseconds: below, it is over before anybody noticed; above, one bad minute costs a day.
pub const EJECTION_BASE_MS: RangeInclusive<u32> = 100..=3_600_000;
/// Longest that an ejection may be at most, in milliseconds: a day.
pub const EJECTION_MAX_MS_MAX: u32 = 86_400_000;
/// Bounds of what ends a connection that lives, in milliseconds: from what a person notices to a month.
pub const LIFETIME_MS: RangeInclusive<u32> = 100..=2_592_000_000;

event_family! {
    /// What can happen in a `traffic` scope.
    TrafficEvent { TrafficPolicySet = 3 from [TrafficPolicySetV1, TrafficPolicySetV2], TrafficPolicyDeleted = 1 }
}

/// This policy holds from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrafficPolicySet {
    /// The whole policy.
    pub policy: TrafficPolicy,
}

/// The scope has no policy of its own any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrafficPolicyDeleted {}

/// How connections to a service are spread over its endpoints and opened, and how long they last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrafficPolicy {
    /// How an endpoint is chosen.
    pub balance: Balance,
    /// Whether endpoints that are near come first.
    pub locality: LocalityPolicy,
    /// Parts of the service that get connections by weight; none if it is not parted.
    pub subsets: Vec<Subset>,
    /// Whether the subset follows from the source address, and not from whose turn it is.
    pub sticky_sources: bool,
    /// For how long an endpoint that became eligible, or came back from an ejection, gets less than its share, growing
    /// to the whole of it, in milliseconds; 0 for not at all.
    pub slow_start_ms: u32,
    /// How a connection to it is opened.
    pub connect: ConnectPolicy,
    /// How much one sidecar opens at most.
    pub limits: CircuitLimits,
    /// When endpoints that fail are kept out of the choice.
    pub outlier_detection: OutlierPolicy,
    /// How long a connection may last.
    pub connection: ConnectionPolicy,
}

/// How an endpoint is chosen among the eligible ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// The one with fewer live connections of two random ones (power of two choices).
    #[default]
    LeastConnections,
    /// The one with the smaller product of connect time and live connections, of two random ones. The time is an average
    /// that follows a rise at once and a fall slowly.
    PeakEwma,
    /// One after the other.
    RoundRobin,
    /// Any, with equal probability.
    Random,
    /// The same one for the same source address, as long as it is eligible; if endpoints come or go, few sources move.
    Maglev,
}

impl Balance {
    /// Every algorithm.
    pub const ALL: [Self; 5] =
        [Self::LeastConnections, Self::PeakEwma, Self::RoundRobin, Self::Random, Self::Maglev];

    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LeastConnections => "least_connections",
            Self::PeakEwma => "peak_ewma",
            Self::RoundRobin => "round_robin",
            Self::Random => "random",
            Self::Maglev => "maglev",
        }
    }
}

/// A part of a service's instances, such as those of one version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subset {
    /// What records call it; unique in its policy.
    pub name: Name,
    /// The metadata that its instances have, all of them. An instance belongs to the first subset that it fits.
    pub labels: BTreeMap<String, String>,
    /// How many connections it gets of as many as all weights together; 0 for none.
    pub weight: u16,
}

/// Whether endpoints near the client come first, and when they are too few for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalityPolicy {
    /// Which ones are near.
    pub prefer: Nearness,
    /// How many of a hundred endpoints of a locality have to be healthy for it to take all connections that are due to it. If fewer
    /// are, it takes as much less, and the rest goes to the next nearest.
    pub threshold_percent: u8,
}

impl Default for LocalityPolicy {
    /// Seven of ten that take the load of ten have two fifths more to bear each, which most are sized for.
    fn default() -> Self {
        Self { prefer: Nearness::Any, threshold_percent: 70 }
    }
}

/// Which endpoints are near.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nearness {
    /// All are alike.
    #[default]
    Any,
    /// Those in the client's region come first.
    Region,
    /// Those in the client's zone come first, then those in its region.
    Zone,
}

impl Nearness {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Any, Self::Region, Self::Zone];

    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::Region => "region",
            Self::Zone => "zone",
        }
    }
}

/// How a connection to an endpoint is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectPolicy {
    /// How long one attempt may take, TCP, TLS and the upstream's app together, in milliseconds.
    pub timeout_ms: u32,
    /// How many other endpoints are tried after a failed attempt, before the first byte.
    pub retries: u8,
    /// The longest that the first retry of a connection is put off, in milliseconds; twice as long for each further one, up to
    /// ten times. How long it really is, is random.
    pub backoff_ms: u32,
    /// How many retries a sidecar makes for each hundred connections to the service.
    pub budget_percent: u8,
    /// How many it may make each second whatever it opens.
    pub budget_min_per_second: u32,
}

impl Default for ConnectPolicy {
    /// One second is far above any healthy connect inside a region; two retries reach a live endpoint when one
    /// of three is dead, without waiting long when all are. A fifth more attempts is what endpoints can bear that are all in trouble;
    /// a hundred a second is nothing to them, and what a burst of connections needs when some endpoints have just died.
    fn default() -> Self {
        Self { timeout_ms: 1_000, retries: 2, backoff_ms: 10, budget_percent: 20, budget_min_per_second: 100 }
    }
}

/// How many connections one sidecar has at most, to each endpoint of a service and to all of them together; none for no
/// limit. Who is above is refused at once: `circuit_open`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CircuitLimits {
    /// Connections to one endpoint, those that are being opened too.
    pub endpoint_connections: Option<u32>,
    /// Connections that are being opened to one endpoint.
    pub endpoint_pending: Option<u32>,
    /// Connections to the service, those that are being opened too.
    pub service_connections: Option<u32>,
    /// Connections that are being opened to the service.
    pub service_pending: Option<u32>,
}

impl CircuitLimits {
    /// Every limit by its name.
    #[must_use]
    pub const fn all(&self) -> [(&'static str, Option<u32>); 4] {
        [
            ("endpoint_connections", self.endpoint_connections),
            ("endpoint_pending", self.endpoint_pending),
            ("service_connections", self.service_connections),
            ("service_pending", self.service_pending),
        ]
    }
}

/// When an endpoint that fails is ejected: passed over for a while, as long as there are others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutlierPolicy {
    /// Whether any is.
    pub enabled: bool,
    /// So many failures in a row eject it: a refused connect, a connect that timed out, a failed TLS handshake; or so many
    /// connections in a row that were reset before the first byte.
    pub failures: u8,
    /// For how long the first time, in milliseconds; twice as long each further time.
    pub ejection_base_ms: u32,
    /// For how long at most, in milliseconds. Who stays for that long without an ejection is as good as new.
    pub ejection_max_ms: u32,
    /// How many of a hundred endpoints of the service are ejected at most; one may always be.
    pub ejected_percent_max: u8,
}

impl Default for OutlierPolicy {
    /// One lost packet is a timeout and says nothing; three in a row are no chance. Ten seconds are what a restart takes. If more than
    /// half of the endpoints fail, it is seldom them.
    fn default() -> Self {
        Self {
            enabled: true,
            failures: 3,
            ejection_base_ms: 10_000,
            ejection_max_ms: 300_000,
            ejected_percent_max: 50,
        }
    }
}

/// How long a connection may last. Both of its ends are reset when it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionPolicy {
    /// Without a byte after one direction ended, in milliseconds; none for ever.
    pub half_open_timeout_ms: Option<u32>,
    /// Without a byte, in milliseconds; none for ever.
    pub idle_timeout_ms: Option<u32>,
    /// At all, in milliseconds; none for ever.
    pub max_age_ms: Option<u32>,
}

impl Default for ConnectionPolicy {
    /// Who pools connections keeps idle ones, and a stream may last for months. One that is half over and silent for an hour was
    /// forgotten.
    fn default() -> Self {
        Self { half_open_timeout_ms: Some(3_600_000), idle_timeout_ms: None, max_age_ms: None }
    }
}

/// What someone wants of a traffic policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrafficCommand {
    /// Replace the policy.
    Put(TrafficPolicy),
    /// Remove it.
    Delete,
}

/// The policy, if the scope has one.
pub type TrafficState = Option<TrafficPolicy>;

/// Decides a command. That the services are declared is checked where all scopes are seen.
///
/// # Errors
/// If the policy makes no sense, or there is none to delete.
pub fn decide(
    scope: &TrafficScope,
    state: &TrafficState,
    command: &TrafficCommand,
) -> Result<Vec<TrafficEvent>, Rejection> {
    match (command, state) {
        (TrafficCommand::Put(wanted), Some(current)) if wanted == current => Ok(Vec::new()),
        (TrafficCommand::Put(wanted), _) => {
            validate(wanted)?;
            Ok(vec![TrafficPolicySet { policy: wanted.clone() }.into()])
        }
        (TrafficCommand::Delete, Some(_)) => Ok(vec![TrafficPolicyDeleted {}.into()]),
        (TrafficCommand::Delete, None) => Err(Rejection::Absent(Scope::Traffic(scope.clone()))),
    }
}

/// The state after an event.
#[must_use]
pub fn apply(_state: TrafficState, event: &TrafficEvent) -> TrafficState {
    match event {
        TrafficEvent::TrafficPolicySet(TrafficPolicySet { policy }) => Some(policy.clone()),
        TrafficEvent::TrafficPolicyDeleted(TrafficPolicyDeleted {}) => None,
    }
}

fn validate(policy: &TrafficPolicy) -> Result<(), Rejection> {
    let within = |field: &str, value: u32, bounds: RangeInclusive<u32>, rule: String| {
        if bounds.contains(&value) { Ok(()) } else { Err(Rejection::invalid(field, rule)) }
    };
    let TrafficPolicy {
        balance: _,
        locality,
        subsets,
        sticky_sources,
        slow_start_ms,
        connect,
        limits,
        outlier_detection,
        connection,
    } = policy;
    validate_subsets(subsets, *sticky_sources)?;
    within(
        "locality.threshold_percent",
        locality.threshold_percent.into(),
        1..=100,
        "from 1 to 100".to_owned(),
    )?;
    let minutes = format!("at most {} min", SLOW_START_MS_MAX / 60_000);
    within("slow_start", *slow_start_ms, 0..=SLOW_START_MS_MAX, minutes)?;
    validate_connect(connect)?;
    for (name, limit) in limits.all() {
        if let Some(limit) = limit {
            let rule = format!("from {} to {}, or left out for no limit", LIMIT.start(), LIMIT.end());
            within(&format!("limits.{name}"), limit, LIMIT, rule)?;
        }
    }
    validate_outliers(outlier_detection)?;
    for (name, milliseconds) in [
        ("half_open_timeout", connection.half_open_timeout_ms),
        ("idle_timeout", connection.idle_timeout_ms),
        ("max_age", connection.max_age_ms),
    ] {
        if let Some(milliseconds) = milliseconds {
            let rule = "from 100 ms to 30 days".to_owned();
            within(&format!("connection.{name}"), milliseconds, LIFETIME_MS, rule)?;
        }
    }
    Ok(())
}

fn validate_subsets(subsets: &[Subset], sticky_sources: bool) -> Result<(), Rejection> {
    if subsets.len() > SUBSETS_MAX {
        return Err(Rejection::invalid("subsets", format!("at most {SUBSETS_MAX}")));
    }
    if sticky_sources && subsets.is_empty() {
        return Err(Rejection::invalid("sticky_sources", "there are no subsets to stick to"));
    }
    let mut names = BTreeSet::new();
    for (index, Subset { name, labels, weight }) in subsets.iter().enumerate() {
        let invalid =
            |field: &str, rule: String| Err(Rejection::invalid(format!("subsets[{index}].{field}"), rule));
        if !names.insert(name) {
            return invalid("name", format!("{name} is there twice"));
        }
        if labels.is_empty() || labels.len() > SUBSET_LABELS_MAX {
            return invalid("labels", format!("from 1 to {SUBSET_LABELS_MAX}"));
        }
        if membership::check_metadata(labels).is_err() {
            return invalid("labels", "such as metadata of an instance may be".into());
        }
        if *weight > WEIGHT_MAX {
            return invalid("weight", format!("at most {WEIGHT_MAX}"));
        }
    }
    if !subsets.is_empty() && subsets.iter().all(|subset| subset.weight == 0) {
        return Err(Rejection::invalid("subsets", "nobody would get a connection: one needs a weight"));
    }
    Ok(())
}

fn validate_connect(connect: &ConnectPolicy) -> Result<(), Rejection> {
    let ConnectPolicy { timeout_ms, retries, backoff_ms, budget_percent, budget_min_per_second } = *connect;
    let invalid = |field: &str, rule: String| Err(Rejection::invalid(format!("connect.{field}"), rule));
    if timeout_ms == 0 || timeout_ms > CONNECT_TIMEOUT_MS_MAX {
        return invalid("timeout", format!("from 1 ms to {} s", CONNECT_TIMEOUT_MS_MAX / 1_000));
    }
    if retries > CONNECT_RETRIES_MAX {
        return invalid("retries", format!("at most {CONNECT_RETRIES_MAX}"));
    }
    if backoff_ms > BACKOFF_MS_MAX {
        return invalid("backoff", format!("at most {} s", BACKOFF_MS_MAX / 1_000));
    }
    if budget_percent > 100 {
        return invalid("budget_percent", "at most 100".into());
    }
    if budget_min_per_second > BUDGET_MIN_PER_SECOND_MAX {
        return invalid("budget_min_per_second", format!("at most {BUDGET_MIN_PER_SECOND_MAX}"));
    }
    Ok(())
}

fn validate_outliers(outliers: &OutlierPolicy) -> Result<(), Rejection> {
    let OutlierPolicy { enabled: _, failures, ejection_base_ms, ejection_max_ms, ejected_percent_max } =
        *outliers;
    let invalid =
        |field: &str, rule: String| Err(Rejection::invalid(format!("outlier_detection.{field}"), rule));
    if failures == 0 || failures > OUTLIER_FAILURES_MAX {
        return invalid("failures", format!("from 1 to {OUTLIER_FAILURES_MAX}"));
    }
    if !EJECTION_BASE_MS.contains(&ejection_base_ms) {
        return invalid("ejection_base", "from 100 ms to 1 h".into());
    }
    if ejection_max_ms < ejection_base_ms || ejection_max_ms > EJECTION_MAX_MS_MAX {
        return invalid("ejection_max", "from ejection_base to 24 h".into());
    }
    if ejected_percent_max == 0 || ejected_percent_max > 100 {
        return invalid("ejected_percent_max", "from 1 to 100".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope() -> TrafficScope {
        "default/api".parse().unwrap()
    }

    #[test]
    fn a_policy_is_set_kept_replaced_and_deleted() {
        let first = TrafficPolicy::default();
        let second = TrafficPolicy { balance: Balance::Random, ..first.clone() };
        let put = |policy: &TrafficPolicy| TrafficCommand::Put(policy.clone());
        let set =
            |policy: &TrafficPolicy| vec![TrafficEvent::from(TrafficPolicySet { policy: policy.clone() })];
        let before = Some(first.clone());
        assert_eq!(decide(&scope(), &None, &put(&first)), Ok(set(&first)));
        assert_eq!(decide(&scope(), &before, &put(&first)), Ok(vec![]));
        assert_eq!(decide(&scope(), &before, &put(&second)), Ok(set(&second)));
        let deleted = decide(&scope(), &before, &TrafficCommand::Delete).unwrap();
        assert_eq!(deleted.iter().fold(Some(first), apply), None);
        assert!(decide(&scope(), &None, &TrafficCommand::Delete).is_err());
    }

    fn subset(name: &str, weight: u16) -> Subset {
        let labels = [("version".to_owned(), name.to_owned())].into();
        Subset { name: name.parse().unwrap(), labels, weight }
    }

    #[test]
    fn every_value_is_bounded_and_the_rejection_names_it() {
        type Change = fn(&mut TrafficPolicy);
        let wrong: [(&str, Change); 29] = [
            ("subsets", |policy| policy.subsets = vec![subset("a", 1); SUBSETS_MAX + 1]),
            ("subsets", |policy| policy.subsets = vec![subset("a", 0)]),
            ("subsets[1].name", |policy| policy.subsets = vec![subset("a", 1), subset("a", 1)]),
            ("subsets[0].weight", |policy| policy.subsets = vec![subset("a", WEIGHT_MAX + 1)]),
            ("subsets[0].labels", |policy| {
                policy.subsets = vec![Subset { labels: BTreeMap::new(), ..subset("a", 1) }];
            }),
            ("subsets[0].labels", |policy| {
                let many = (0..=SUBSET_LABELS_MAX).map(|number| (number.to_string(), String::new()));
                policy.subsets = vec![Subset { labels: many.collect(), ..subset("a", 1) }];
            }),
            ("subsets[0].labels", |policy| {
                let labels = [("version".to_owned(), "\n".to_owned())].into();
                policy.subsets = vec![Subset { labels, ..subset("a", 1) }];
            }),
            ("sticky_sources", |policy| policy.sticky_sources = true),
            ("locality.threshold_percent", |policy| policy.locality.threshold_percent = 0),
            ("locality.threshold_percent", |policy| policy.locality.threshold_percent = 101),
            ("slow_start", |policy| policy.slow_start_ms = SLOW_START_MS_MAX + 1),
            ("connect.timeout", |policy| policy.connect.timeout_ms = 0),
            ("connect.timeout", |policy| policy.connect.timeout_ms = CONNECT_TIMEOUT_MS_MAX + 1),
            ("connect.retries", |policy| policy.connect.retries = CONNECT_RETRIES_MAX + 1),
            ("connect.backoff", |policy| policy.connect.backoff_ms = BACKOFF_MS_MAX + 1),
            ("connect.budget_percent", |policy| policy.connect.budget_percent = 101),
            ("connect.budget_min_per_second", |policy| policy.connect.budget_min_per_second = u32::MAX),
            ("limits.endpoint_connections", |policy| policy.limits.endpoint_connections = Some(0)),
            ("limits.endpoint_pending", |policy| policy.limits.endpoint_pending = Some(0)),
            ("limits.service_connections", |policy| policy.limits.service_connections = Some(u32::MAX)),
            ("limits.service_pending", |policy| policy.limits.service_pending = Some(0)),
            ("outlier_detection.failures", |policy| policy.outlier_detection.failures = 0),
            ("outlier_detection.ejection_base", |policy| policy.outlier_detection.ejection_base_ms = 99),
            ("outlier_detection.ejection_max", |policy| policy.outlier_detection.ejection_max_ms = 9_999),
            ("outlier_detection.ejected_percent_max", |policy| {
                policy.outlier_detection.ejected_percent_max = 0;
            }),
            ("outlier_detection.ejected_percent_max", |policy| {
                policy.outlier_detection.ejected_percent_max = 101;
            }),
            ("connection.half_open_timeout", |policy| policy.connection.half_open_timeout_ms = Some(0)),
            ("connection.idle_timeout", |policy| policy.connection.idle_timeout_ms = Some(99)),
            ("connection.max_age", |policy| policy.connection.max_age_ms = Some(u32::MAX)),
        ];
        for (field, change) in wrong {
            let mut policy = TrafficPolicy::default();
            change(&mut policy);
            match decide(&scope(), &None, &TrafficCommand::Put(policy)) {
                Err(Rejection::Invalid { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_past_policy_is_read_with_what_was_not_said_then() {
        let read = |schema, policy: &str| {
            let payload = format!(r#"{{"policy":{policy}}}"#);
            match TrafficEvent::decode("TrafficPolicySet", schema, &payload) {
                Ok(TrafficEvent::TrafficPolicySet(set)) => Some(set.policy),
                _ => None,
            }
        };
        let said = r#"{"balance":"random","connect":{"timeout_ms":500,"retries":1}}"#;
        let policy = TrafficPolicy {
            balance: Balance::Random,
            connect: ConnectPolicy { timeout_ms: 500, retries: 1, ..ConnectPolicy::default() },
            ..TrafficPolicy::default()
        };
        assert_eq!(read(1, said), Some(policy.clone()));
        assert_eq!(read(1, "{}"), Some(TrafficPolicy::default()));
        assert_eq!(read(1, r#"{"balance":"maglev"}"#), None, "nobody could have written that");
        assert_eq!((read(2, said), read(2, "{}")), (None, None), "all of it is written since");
        let current = serde_json::to_string(&policy).unwrap();
        assert_eq!((read(3, &current), read(2, &current)), (Some(policy.clone()), None));
        let newer =
            r#""locality":{"prefer":"any","threshold_percent":70},"subsets":[],"sticky_sources":false,"#;
        let without = current.replace(newer, "");
        assert_eq!((read(2, &without), read(3, &without)), (Some(policy), None));
    }
}
