//! The `security` scope: who may connect to what. How the policies of several scopes combine into one verdict is
//! the evaluator's business, in the routing crate.

mod past;

use crate::event::event_family;
use crate::id::{Name, Namespace, Port, ServiceName};
use crate::rejection::Rejection;
use crate::scope::{Scope, SecurityScope};
use past::SecurityPolicySetV1;
pub(crate) use past::SecurityPolicyV1;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ops::RangeInclusive;

/// Most rules of one policy: a person can still read it, and one evaluation stays in microseconds.
pub const RULES_MAX: usize = 256;
/// Most services, namespaces and ports that one rule may list.
pub const RULE_LIST_MAX: usize = 1024;
/// Bounds of the grace that live connections may get, in milliseconds: below, it is a cut; above a day, it is forgotten.
pub const GRACE_MS: RangeInclusive<u32> = 100..=86_400_000;

event_family! {
    /// What can happen in a `security` scope.
    SecurityEvent { SecurityPolicySet = 2 from [SecurityPolicySetV1], SecurityPolicyDeleted = 1 }
}

/// This policy holds from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecurityPolicySet {
    /// The whole policy.
    pub policy: SecurityPolicy,
}

/// The scope has no policy of its own any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecurityPolicyDeleted {}

/// Who may connect to the services of a scope.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecurityPolicy {
    /// What happens to a connection that no rule matches; if none, a wider scope says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<Action>,
    /// Whether its refusals refuse.
    #[serde(default)]
    pub mode: Mode,
    /// What happens to live connections that are not permitted any more; if none, a wider scope says, and if none does they are cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_change: Option<OnChange>,
    /// The rules, in any order: a matching deny beats every allow.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

/// What is done to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Let it pass.
    Allow,
    /// Refuse it.
    Deny,
}

impl Action {
    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

/// Whether a policy's refusals refuse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// They do.
    #[default]
    Enforce,
    /// They are only recorded; the connection passes.
    Audit,
}

impl Mode {
    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Audit => "audit",
        }
    }
}

/// What happens to a connection that was permitted, lives, and is not permitted any more. The stricter one is the lesser.
///
/// It never saves a connection whose source a deny rule names, or whose identity is not good any more: who is to be kept out
/// goes at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnChange {
    /// It is cut at once.
    #[default]
    Cut,
    /// It is cut when so many milliseconds have passed, unless it is permitted again before.
    #[serde(rename = "grace_ms")]
    Grace(u32),
    /// It goes on until it ends.
    Keep,
}

impl OnChange {
    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cut => "cut",
            Self::Grace(_) => "grace",
            Self::Keep => "keep",
        }
    }
}

/// One rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What records and explanations call it; unique in its policy.
    pub name: Name,
    /// What it does to a connection that it matches.
    pub action: Action,
    /// Whose connections it matches.
    pub from: Sources,
    /// The service's ports that it matches; all if empty.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub ports: BTreeSet<Port>,
}

/// A set of connecting services.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sources {
    /// Every service of the mesh.
    #[serde(default, skip_serializing_if = "is_false")]
    pub any: bool,
    /// These services.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub services: BTreeSet<ServiceName>,
    /// Every service of these namespaces.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub namespaces: BTreeSet<Namespace>,
}

impl Sources {
    /// Whether `service` is in the set.
    #[must_use]
    pub fn contain(&self, service: &ServiceName) -> bool {
        self.any || self.services.contains(service) || self.namespaces.contains(&service.namespace)
    }
}

impl Rule {
    /// Whether the rule matches a connection from `source` to `port`.
    #[must_use]
    pub fn matches(&self, source: &ServiceName, port: Port) -> bool {
        (self.ports.is_empty() || self.ports.contains(&port)) && self.from.contain(source)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
const fn is_false(value: &bool) -> bool {
    !*value
}

/// What someone wants of a security policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecurityCommand {
    /// Replace the policy.
    Put(SecurityPolicy),
    /// Remove it.
    Delete,
}

/// The policy, if the scope has one.
pub type SecurityState = Option<SecurityPolicy>;

/// Decides a command. That the named services are declared is checked where all scopes are seen.
///
/// # Errors
/// If the policy makes no sense, or there is none to delete.
pub fn decide(
    scope: &SecurityScope,
    state: &SecurityState,
    command: &SecurityCommand,
) -> Result<Vec<SecurityEvent>, Rejection> {
    match (command, state) {
        (SecurityCommand::Put(wanted), Some(current)) if wanted == current => Ok(Vec::new()),
        (SecurityCommand::Put(wanted), _) => {
            validate(wanted)?;
            Ok(vec![SecurityPolicySet { policy: wanted.clone() }.into()])
        }
        (SecurityCommand::Delete, Some(_)) => Ok(vec![SecurityPolicyDeleted {}.into()]),
        (SecurityCommand::Delete, None) => Err(Rejection::Absent(Scope::Security(scope.clone()))),
    }
}

/// The state after an event.
#[must_use]
pub fn apply(_state: SecurityState, event: &SecurityEvent) -> SecurityState {
    match event {
        SecurityEvent::SecurityPolicySet(SecurityPolicySet { policy }) => Some(policy.clone()),
        SecurityEvent::SecurityPolicyDeleted(SecurityPolicyDeleted {}) => None,
    }
}

fn validate(policy: &SecurityPolicy) -> Result<(), Rejection> {
    if policy.rules.len() > RULES_MAX {
        return Err(Rejection::invalid("rules", format!("at most {RULES_MAX}")));
    }
    match policy.on_change {
        Some(OnChange::Grace(ms)) if !GRACE_MS.contains(&ms) => {
            return Err(Rejection::invalid("grace", "from 100 ms to 24 h"));
        }
        Some(OnChange::Cut | OnChange::Grace(_) | OnChange::Keep) | None => {}
    }
    let mut names = BTreeSet::new();
    for (index, rule) in policy.rules.iter().enumerate() {
        let invalid =
            |field: &str, rule: String| Err(Rejection::invalid(format!("rules[{index}]{field}"), rule));
        if !names.insert(&rule.name) {
            return invalid(".name", format!("{} is there twice", rule.name));
        }
        let Sources { any, services, namespaces } = &rule.from;
        let listed = services.len() + namespaces.len();
        if !any && listed == 0 {
            return invalid(".from", "matches nobody; for everybody write { any: true }".into());
        }
        if *any && listed > 0 {
            return invalid(".from", "any already means everybody; leave out services and namespaces".into());
        }
        if listed > RULE_LIST_MAX || rule.ports.len() > RULE_LIST_MAX {
            return invalid("", format!("lists at most {RULE_LIST_MAX} sources and as many ports"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(name: &str, from: Sources) -> Rule {
        Rule { name: name.parse().unwrap(), action: Action::Allow, from, ports: BTreeSet::new() }
    }

    fn from_api() -> Sources {
        Sources { services: ["default/api".parse().unwrap()].into(), ..Sources::default() }
    }

    #[test]
    fn a_rule_matches_its_sources_on_its_ports() {
        let api = "default/api".parse().unwrap();
        let web = "shop/web".parse().unwrap();
        let (sql, other) = (Port::new(5432).unwrap(), Port::new(80).unwrap());
        let mut named = rule("r", from_api());
        assert!(named.matches(&api, sql) && named.matches(&api, other) && !named.matches(&web, sql));
        named.ports.insert(sql);
        assert!(named.matches(&api, sql) && !named.matches(&api, other));
        let shop = Sources { namespaces: ["shop".parse().unwrap()].into(), ..Sources::default() };
        assert!(rule("r", shop.clone()).matches(&web, sql) && !rule("r", shop).matches(&api, sql));
        let any = Sources { any: true, ..Sources::default() };
        assert!(rule("r", any.clone()).matches(&web, sql) && rule("r", any).matches(&api, sql));
    }

    #[test]
    fn rules_that_say_nothing_or_too_much_are_refused() {
        let contradiction = Sources { any: true, ..from_api() };
        let many = (0..=RULES_MAX).map(|i| rule(&format!("r{i}"), from_api())).collect();
        for rules in [
            vec![rule("r", Sources::default())],
            vec![rule("r", contradiction)],
            vec![rule("r", from_api()), rule("r", from_api())],
            many,
        ] {
            let policy = SecurityPolicy { rules, ..SecurityPolicy::default() };
            let result = decide(&SecurityScope::Mesh, &None, &SecurityCommand::Put(policy));
            assert!(matches!(result, Err(Rejection::Invalid { .. })));
        }
    }

    #[test]
    fn the_stored_form_is_what_people_write() {
        let mut api_may_query = rule("api-may-query", from_api());
        api_may_query.ports.insert(Port::new(5432).unwrap());
        let policy = SecurityPolicy {
            default: Some(Action::Deny),
            mode: Mode::Enforce,
            on_change: None,
            rules: vec![api_may_query],
        };
        let graceful =
            SecurityPolicy { on_change: Some(OnChange::Grace(30_000)), rules: Vec::new(), ..policy.clone() };
        let event = SecurityEvent::from(SecurityPolicySet { policy: graceful });
        assert_eq!(
            event.payload().unwrap(),
            r#"{"policy":{"default":"deny","mode":"enforce","on_change":{"grace_ms":30000},"rules":[]}}"#
        );
        let event = SecurityEvent::from(SecurityPolicySet { policy });
        assert_eq!(
            event.payload().unwrap(),
            r#"{"policy":{"default":"deny","mode":"enforce","rules":[{"name":"api-may-query","action":"allow","from":{"services":["default/api"]},"ports":[5432]}]}}"#
        );
    }

    #[test]
    fn a_grace_is_bounded_and_said() {
        for (on_change, fits) in [
            (OnChange::Grace(0), false),
            (OnChange::Grace(*GRACE_MS.start()), true),
            (OnChange::Grace(*GRACE_MS.end()), true),
            (OnChange::Grace(*GRACE_MS.end() + 1), false),
            (OnChange::Cut, true),
            (OnChange::Keep, true),
        ] {
            let policy = SecurityPolicy { on_change: Some(on_change), ..SecurityPolicy::default() };
            let decided = decide(&SecurityScope::Mesh, &None, &SecurityCommand::Put(policy));
            assert_eq!(decided.is_ok(), fits, "{on_change:?}");
        }
        assert!(OnChange::Cut < OnChange::Grace(1) && OnChange::Grace(u32::MAX) < OnChange::Keep);
    }

    #[test]
    fn a_past_policy_is_read_as_one_that_says_nothing_of_live_connections() {
        let read = |schema, policy: &str| {
            let payload = format!(r#"{{"policy":{policy}}}"#);
            match SecurityEvent::decode("SecurityPolicySet", schema, &payload) {
                Ok(SecurityEvent::SecurityPolicySet(set)) => Some(set.policy),
                _ => None,
            }
        };
        let said = r#"{"default":"deny","rules":[]}"#;
        let policy = SecurityPolicy { default: Some(Action::Deny), ..SecurityPolicy::default() };
        assert_eq!((read(1, said), read(2, said)), (Some(policy.clone()), Some(policy)));
        let kept = r#"{"mode":"enforce","on_change":"keep","rules":[]}"#;
        assert_eq!(read(1, kept), None, "nobody could have written that");
        assert_eq!(read(2, kept).unwrap().on_change, Some(OnChange::Keep));
    }
}
