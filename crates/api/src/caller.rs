//! Who calls, and what they may do.
//!
//! Who calls is known from the mTLS leaf alone: the listener verified it and put a [`Peer`] beside the request. Nothing
//! a request says about its sender is believed. Who may call what is the table in [`permits`], and only there.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use tokio::time::Instant;
use tonic::{Extensions, Request, Status};
use weft_identity::certificate::PeerIdentity;
use weft_identity::spiffe::{Role, SpiffeId, Subject};
use weft_model::{InstanceId, Timestamp};

use crate::Clock;
use crate::status::ApiError;

/// What somebody is told whose leaf ended while it was connected.
pub(crate) const LEAF_ENDED: &str = "the client certificate ended; connect again with a renewed one";

/// The other end of a connection, as the listener found it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where it is.
    pub address: SocketAddr,
    /// What its verified leaf says; none if it presented none.
    pub identity: Option<PeerIdentity>,
}

impl Peer {
    /// Where it is, as far as that tells one party from another: whoever has an IPv6 address has as a rule all that share
    /// its first half.
    #[must_use]
    pub fn network(&self) -> IpAddr {
        match self.address.ip().to_canonical() {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        }
    }
}

/// A peer with a name.
#[derive(Clone, Debug)]
pub struct Caller {
    id: SpiffeId,
    leaf_not_after: Timestamp,
}

/// What a call needs.
#[derive(Clone, Copy, Debug)]
pub enum Need<'a> {
    /// Looks at the mesh or its log.
    Read,
    /// Changes services, policies or defaults, or several things at once.
    Change,
    /// Lets somebody join.
    CreateToken,
    /// Registers, drains or deregisters this instance.
    Membership(&'a InstanceId),
    /// Says how this instance is.
    Observe(&'a InstanceId),
    /// Decides for the mesh as a whole.
    Administer,
    /// Gets a snapshot or a leaf of its own.
    Sidecar,
}

/// The table. An instance speaks for itself and for nobody else; a controller calls nobody.
#[must_use]
pub fn permits(subject: &Subject, need: Need<'_>) -> bool {
    match (subject, need) {
        (Subject::Operator { role, .. }, Need::Read) => role.permits(Role::Viewer),
        (Subject::Operator { role, .. }, Need::Change | Need::CreateToken | Need::Membership(_)) => {
            role.permits(Role::Operator)
        }
        (Subject::Operator { role, .. }, Need::Administer) => role.permits(Role::Admin),
        (Subject::Operator { .. }, Need::Observe(_) | Need::Sidecar) => false,
        (Subject::Instance(own), Need::Membership(instance) | Need::Observe(instance)) => own == instance,
        (Subject::Instance(_), Need::Sidecar) => true,
        (Subject::Instance(_), Need::Read | Need::Change | Need::CreateToken | Need::Administer)
        | (Subject::Controller(_), _) => false,
    }
}

impl Need<'_> {
    /// What to ask for to be permitted.
    fn remedy(self) -> &'static str {
        match self {
            Self::Read => "it needs an operator credential with the role viewer",
            Self::Change | Self::CreateToken => "it needs an operator credential with the role operator",
            Self::Membership(_) => "it needs the instance's own leaf, or an operator credential",
            Self::Observe(_) => "it needs the instance's own leaf",
            Self::Administer => "it needs an operator credential with the role admin",
            Self::Sidecar => "it needs the leaf of an instance",
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Change => "change",
            Self::CreateToken => "create_token",
            Self::Membership(_) => "membership",
            Self::Observe(_) => "observe",
            Self::Administer => "administer",
            Self::Sidecar => "sidecar",
        }
    }
}

impl Caller {
    /// The caller of a request.
    ///
    /// # Errors
    /// If it showed no leaf, or one that has ended since the connection was made.
    pub fn of(extensions: &Extensions, now: Timestamp) -> Result<Self, ApiError> {
        let identity = extensions.get::<Peer>().and_then(|peer| peer.identity.as_ref());
        let Some(PeerIdentity { id, not_after, .. }) = identity else {
            metrics::counter!("weft_api_refused_total", "reason" => "unauthenticated").increment(1);
            let message =
                "this call needs a client certificate; join the mesh, or use an operator credential";
            return Err(ApiError::Unauthenticated(message.into()));
        };
        if *not_after < now {
            metrics::counter!("weft_api_refused_total", "reason" => "expired").increment(1);
            return Err(ApiError::Unauthenticated(LEAF_ENDED.into()));
        }
        Ok(Self { id: id.clone(), leaf_not_after: *not_after })
    }

    /// Checks the table.
    ///
    /// # Errors
    /// If the caller may not do it. That is logged and counted.
    pub fn require(&self, need: Need<'_>) -> Result<(), ApiError> {
        if permits(&self.id.subject, need) {
            return Ok(());
        }
        let what = need.as_str();
        metrics::counter!("weft_api_refused_total", "reason" => what).increment(1);
        tracing::warn!(caller = %self.id, ?need, "call refused");
        Err(ApiError::Denied(format!("{} may not do this; {}", self.id, need.remedy())))
    }

    /// The instance that calls for itself.
    ///
    /// # Errors
    /// If the caller is no instance.
    pub fn sidecar(&self) -> Result<&InstanceId, ApiError> {
        self.require(Need::Sidecar)?;
        self.id.as_instance().ok_or_else(|| ApiError::Denied("only an instance may do this".into()))
    }

    /// When its leaf ends, and with it whatever goes on until then.
    #[must_use]
    pub fn ends(&self, now: Timestamp) -> Instant {
        Instant::now() + self.leaf_not_after.since(now)
    }

    /// How the log names it.
    #[must_use]
    pub fn actor(&self) -> String {
        self.id.to_string()
    }
}

/// Lets anybody with a good leaf of the mesh pass.
pub(crate) fn any_member(clock: Clock) -> impl Fn(Request<()>) -> Result<Request<()>, Status> + Clone {
    move |request| {
        Caller::of(request.extensions(), clock())?;
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operator(role: Role) -> Subject {
        Subject::Operator { role, name: "ann".parse().unwrap() }
    }

    #[test]
    fn a_network_is_an_address_or_half_of_one() {
        let network = |address: &str| Peer { address: address.parse().unwrap(), identity: None }.network();
        assert_eq!(network("192.0.2.7:1"), network("192.0.2.7:2"));
        assert_eq!(network("[::ffff:192.0.2.7]:1"), network("192.0.2.7:2"));
        assert_ne!(network("192.0.2.7:1"), network("192.0.2.8:1"));
        assert_eq!(network("[2001:db8:1:2:3::]:1"), network("[2001:db8:1:2::9]:1"));
        assert_ne!(network("[2001:db8:1:2::]:1"), network("[2001:db8:1:3::]:1"));
    }

    #[test]
    fn the_table_is_as_documented() {
        let (own, other): (InstanceId, InstanceId) =
            ("default/api/api-1".parse().unwrap(), "default/api/api-2".parse().unwrap());
        let needs = [
            Need::Read,
            Need::Change,
            Need::CreateToken,
            Need::Membership(&own),
            Need::Membership(&other),
            Need::Observe(&own),
            Need::Observe(&other),
            Need::Administer,
            Need::Sidecar,
        ];
        let row = |subject: &Subject| needs.map(|need| u8::from(permits(subject, need)));
        assert_eq!(row(&operator(Role::Viewer)), [1, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(row(&operator(Role::Operator)), [1, 1, 1, 1, 1, 0, 0, 0, 0]);
        assert_eq!(row(&operator(Role::Admin)), [1, 1, 1, 1, 1, 0, 0, 1, 0]);
        assert_eq!(row(&Subject::Instance(own.clone())), [0, 0, 0, 1, 0, 1, 0, 0, 1]);
        assert_eq!(row(&Subject::Controller("c1".parse().unwrap())), [0; 9]);
    }
}
