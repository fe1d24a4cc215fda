//! The one evaluator: whether a connection passes, and which rule says so. The sidecar asks it for every connection and
//! again for every live one on each snapshot; the API asks it for people. There is no other (I8).
//!
//! Of all policies that cover the service (its own, its namespace's, the mesh's):
//! 1. a matching deny rule refuses, whatever else matches;
//! 2. else a matching allow rule admits;
//! 3. else the default of the nearest policy that has one decides;
//! 4. else the mesh's default.
//!
//! A policy in audit mode changes no verdict: the verdict is what it would be without it. Where it would have
//! refused, that is said beside the verdict.
//!
//! What becomes of a live connection that is refused now ([`authorize_live`]) the policies say as well, those in audit mode left out:
//! 1. if deny rules match, each says: *cut* if it names the source by its service or namespace, else what its policy says, and *cut* if
//!    that says nothing. The strictest holds;
//! 2. else, so if nothing permits it any more, the nearest policy that says anything;
//! 3. else it is cut.

use crate::shard::{InboundShard, PolicyLayer};
use std::fmt;
use weft_model::security::{Action, Mode, OnChange};
use weft_model::{Name, Port, ScopeVersion, SecurityScope, ServiceName};

/// Whether a connection passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict<'a> {
    /// What is done, and why.
    pub ruling: Ruling<'a>,
    /// Set if policies in audit mode would have refused what passes: the ruling as it would be with them.
    pub would_refuse: Option<Ruling<'a>>,
}

impl Verdict<'_> {
    /// Whether the connection passes.
    #[must_use]
    pub fn permitted(&self) -> bool {
        self.ruling.action == Action::Allow
    }
}

/// An action and what it rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruling<'a> {
    /// What is done.
    pub action: Action,
    /// What says so.
    pub by: Decider<'a>,
}

/// A live connection is not permitted any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forbidden<'a> {
    /// What is done with it.
    pub on_change: OnChange,
    /// What refuses it: of the rules that do, the one whose say it is.
    pub by: Decider<'a>,
}

/// What a ruling rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decider<'a> {
    /// A rule that matches.
    Rule {
        /// The policy's scope.
        scope: &'a SecurityScope,
        /// Its version and last event.
        source: ScopeVersion,
        /// The rule.
        rule: &'a Name,
    },
    /// A policy's default.
    PolicyDefault {
        /// The policy's scope.
        scope: &'a SecurityScope,
        /// Its version and last event.
        source: ScopeVersion,
    },
    /// The mesh's default.
    MeshDefault {
        /// The event that set it; zero if nobody did.
        source: ScopeVersion,
    },
}

impl Decider<'_> {
    /// The version and last event of the scope that it belongs to.
    #[must_use]
    pub const fn source(&self) -> ScopeVersion {
        match self {
            Self::Rule { source, .. } | Self::PolicyDefault { source, .. } | Self::MeshDefault { source } => {
                *source
            }
        }
    }
}

/// As records show it: `security/<scope>#<rule>`, `security/<scope>#default`, or `mesh#default`.
impl fmt::Display for Decider<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule { scope, rule, .. } => write!(f, "security/{scope}#{rule}"),
            Self::PolicyDefault { scope, .. } => write!(f, "security/{scope}#default"),
            Self::MeshDefault { .. } => f.write_str("mesh#default"),
        }
    }
}

/// Evaluates a connection from an instance of `source` to `port` of the shard's service.
#[must_use]
pub fn authorize<'a>(inbound: &'a InboundShard, source: &ServiceName, port: Port) -> Verdict<'a> {
    let ruling = evaluate(inbound, source, port, enforced);
    let audited = inbound.layers.iter().any(|layer| !enforced(layer));
    let would_refuse = (audited && ruling.action == Action::Allow)
        .then(|| evaluate(inbound, source, port, |_| true))
        .filter(|with_audit| with_audit.action == Action::Deny);
    Verdict { ruling, would_refuse }
}

/// Evaluates a connection that was permitted, and lives. None if it is still permitted.
#[must_use]
pub fn authorize_live<'a>(
    inbound: &'a InboundShard,
    source: &ServiceName,
    port: Port,
) -> Option<Forbidden<'a>> {
    let layers = || inbound.layers.iter().filter(|layer| enforced(layer));
    let denies = layers().flat_map(|layer| {
        let matching = layer
            .policy
            .rules
            .iter()
            .filter(|rule| rule.action == Action::Deny && rule.matches(source, port));
        matching.map(move |rule| {
            let said = if rule.from.any { layer.policy.on_change.unwrap_or_default() } else { OnChange::Cut };
            (said, Decider::Rule { scope: &layer.scope, source: layer.source, rule: &rule.name })
        })
    });
    if let Some((on_change, by)) = denies.min_by_key(|(on_change, _)| *on_change) {
        return Some(Forbidden { on_change, by });
    }
    let Ruling { action, by } = evaluate(inbound, source, port, enforced);
    let on_change = || layers().find_map(|layer| layer.policy.on_change).unwrap_or_default();
    (action == Action::Deny).then(|| Forbidden { on_change: on_change(), by })
}

fn enforced(layer: &PolicyLayer) -> bool {
    layer.policy.mode == Mode::Enforce
}

fn evaluate<'a>(
    inbound: &'a InboundShard,
    source: &ServiceName,
    port: Port,
    counts: impl Fn(&PolicyLayer) -> bool,
) -> Ruling<'a> {
    let layers = || inbound.layers.iter().filter(|layer| counts(layer));
    let matching = |action: Action| {
        layers().find_map(|layer| {
            let rule =
                layer.policy.rules.iter().find(|rule| rule.action == action && rule.matches(source, port))?;
            let by = Decider::Rule { scope: &layer.scope, source: layer.source, rule: &rule.name };
            Some(Ruling { action, by })
        })
    };
    let default = || {
        layers().find_map(|layer| {
            let action = layer.policy.default?;
            Some(Ruling { action, by: Decider::PolicyDefault { scope: &layer.scope, source: layer.source } })
        })
    };
    matching(Action::Deny).or_else(|| matching(Action::Allow)).or_else(default).unwrap_or(Ruling {
        action: inbound.mesh_default,
        by: Decider::MeshDefault { source: inbound.mesh_source },
    })
}
