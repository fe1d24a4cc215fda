//! The running rollout as the fold sees it: which shards its canaries get built otherwise, and who they are to be.

use crate::hash::Hash;
use crate::shard::{PolicyLayer, ResolvedTraffic, ShardKey};
use crate::state::RoutingState;
use std::collections::BTreeSet;
use weft_model::health::Health;
use weft_model::membership::{MembershipState, Upstreams};
use weft_model::rollout::{CANARIES_MAX, Candidate, RolloutBegun, WHOLE_PPM};
use weft_model::{InstanceId, Scope, ScopeVersion, SecurityScope, ServiceName, TrafficScope};

/// Who runs the shards that are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Audience {
    /// Everybody but canaries.
    Everybody,
    /// The canaries of the running rollout.
    Canaries,
}

impl RoutingState {
    /// The rollout that canaries run, and the event that began it.
    #[must_use]
    pub fn running_rollout(&self) -> Option<(&RolloutBegun, ScopeVersion)> {
        Some((self.rollout.state.running()?, self.rollout.source))
    }

    /// Whether an instance is a canary of the running rollout.
    pub(crate) fn is_canary(&self, instance: &InstanceId) -> bool {
        self.running_rollout().is_some_and(|(begun, _)| begun.canaries.contains(instance))
    }

    /// Whether the running rollout has a policy for a scope.
    pub(crate) fn in_rollout(&self, scope: &Scope) -> bool {
        self.tried(scope).is_some()
    }

    /// Whether canaries get a shard built otherwise than everybody.
    pub(crate) fn has_variant(&self, key: &ShardKey) -> bool {
        let Some((begun, _)) = self.running_rollout() else { return false };
        begun.candidates.iter().any(|candidate| match (candidate, key) {
            (Candidate::Traffic { scope, .. }, ShardKey::Endpoints(service)) => scope.destination == *service,
            (Candidate::Security { scope, .. }, ShardKey::Inbound(service)) => {
                scope.covers(service) && begun.canaries.iter().any(|canary| canary.service == *service)
            }
            (Candidate::Traffic { .. } | Candidate::Security { .. }, _) => false,
        })
    }

    /// The shards of which canaries of a rollout may get variants: of inbound policies only those of services with a canary.
    pub(crate) fn variants(begun: &RolloutBegun) -> BTreeSet<ShardKey> {
        let keys = |candidate: &Candidate| -> Vec<ShardKey> {
            match candidate {
                Candidate::Traffic { scope, .. } => vec![ShardKey::Endpoints(scope.destination.clone())],
                Candidate::Security { scope, .. } => {
                    let services = begun.canaries.iter().map(|canary| &canary.service);
                    let covered = services.filter(|service| scope.covers(service));
                    covered.cloned().map(ShardKey::Inbound).collect()
                }
            }
        };
        begun.candidates.iter().flat_map(keys).collect()
    }

    /// The policies of the running rollout.
    pub(crate) fn candidates(&self) -> impl Iterator<Item = &Candidate> {
        self.running_rollout().into_iter().flat_map(|(begun, _)| &begun.candidates)
    }

    /// What canaries try instead of a scope's own policy, and since when.
    fn tried(&self, scope: &Scope) -> Option<(&Candidate, ScopeVersion)> {
        let (begun, source) = self.running_rollout()?;
        let candidate = begun.candidates.iter().find(|candidate| candidate.scope() == *scope)?;
        Some((candidate, source))
    }

    /// The traffic policy of a scope, as an audience gets it.
    pub(crate) fn traffic_for(&self, audience: Audience, scope: &TrafficScope) -> Option<ResolvedTraffic> {
        if audience == Audience::Canaries
            && let Some((Candidate::Traffic { policy, .. }, source)) =
                self.tried(&Scope::Traffic(scope.clone()))
        {
            return policy.clone().map(|policy| ResolvedTraffic { policy, source });
        }
        let entry = self.traffic_policy(scope)?;
        entry.state.clone().map(|policy| ResolvedTraffic { policy, source: entry.source })
    }

    /// The traffic scopes for connections to a service from one other.
    pub(crate) fn traffic_scopes_to<'a>(
        &'a self,
        audience: Audience,
        service: &'a ServiceName,
    ) -> BTreeSet<&'a TrafficScope> {
        let new = self.candidates().filter_map(|candidate| match candidate {
            Candidate::Traffic { scope, .. } => Some(scope),
            Candidate::Security { .. } => None,
        });
        let new = new.filter(|scope| audience == Audience::Canaries && scope.destination == *service);
        self.traffic_to(service).map(|(scope, _)| scope).chain(new).collect()
    }

    /// The security policy of a scope, as an audience gets it.
    pub(crate) fn security_for(&self, audience: Audience, scope: SecurityScope) -> Option<PolicyLayer> {
        if audience == Audience::Canaries
            && let Some((Candidate::Security { policy, .. }, source)) =
                self.tried(&Scope::Security(scope.clone()))
        {
            return policy.clone().map(|policy| PolicyLayer { scope, source, policy });
        }
        let entry = self.security_policy(&scope)?;
        let policy = entry.state.clone()?;
        Some(PolicyLayer { scope, source: entry.source, policy })
    }

    /// The ready instances whose sidecars a policy concerns: those that enforce it.
    fn concerned(&self, candidate: &Candidate) -> Vec<InstanceId> {
        let ready = |service: &ServiceName, may: &dyn Fn(&Upstreams) -> bool| -> Vec<InstanceId> {
            let live = self.live_instances_of(service);
            let ready = live.filter(|(_, entry, _)| matches!(entry.state, MembershipState::Ready(_)));
            ready.filter(|(.., registration)| may(&registration.upstreams)).map(|(id, ..)| id).collect()
        };
        match candidate {
            Candidate::Traffic { scope: TrafficScope { source, destination }, .. } => {
                let sources = self
                    .live
                    .keys()
                    .filter(|service| source.as_ref().is_none_or(|source| source == *service));
                sources
                    .flat_map(|service| ready(service, &|upstreams| upstreams.contains(destination)))
                    .collect()
            }
            Candidate::Security { scope, .. } => {
                let covered = self.live.keys().filter(|service| scope.covers(service));
                covered.flat_map(|service| ready(service, &|_| true)).collect()
            }
        }
    }

    /// Who is to be a canary: of those that each policy concerns so large a share, at least one of them, and rather healthy ones than
    /// others, of which it is not known whether they are there. Which ones looks random, and is another choice for the next rollout.
    ///
    /// # Errors
    /// The scope of a policy that concerns nobody.
    pub(crate) fn pick_canaries(
        &self,
        candidates: &[Candidate],
        share_ppm: u32,
    ) -> Result<BTreeSet<InstanceId>, Scope> {
        let salt = self.rollout.source.position;
        let mut canaries = BTreeSet::new();
        for candidate in candidates {
            let mut concerned = self.concerned(candidate);
            if concerned.is_empty() {
                return Err(candidate.scope());
            }
            concerned.sort_by_cached_key(|instance| {
                let is_healthy = self.health_seen(instance) == Health::Healthy;
                (!is_healthy, Hash::of(format!("{salt} {instance}").as_bytes()))
            });
            concerned.truncate(share_of(concerned.len(), share_ppm).min(CANARIES_MAX / candidates.len()));
            canaries.extend(concerned);
        }
        Ok(canaries)
    }
}

/// So large a share of some things, at least one.
fn share_of(count: usize, share_ppm: u32) -> usize {
    let share = (count as u64).saturating_mul(share_ppm.into()).div_ceil(WHOLE_PPM.into());
    usize::try_from(share).unwrap_or(usize::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_rounded_up_and_never_nobody() {
        for (count, share_ppm, of) in
            [(3, 1, 1), (100, 50_000, 5), (101, 50_000, 6), (7, WHOLE_PPM, 7), (100_000, 10_000, 1_000)]
        {
            assert_eq!(share_of(count, share_ppm), of, "{count} {share_ppm}");
        }
    }
}
