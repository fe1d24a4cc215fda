//! Who calls, and what they may do.
//!
//! Who calls is known from the mTLS leaf alone: the listener verified it and put a [`Peer`] beside the request. Nothing
//! a request says about its sender is believed. Who may call what is the table in [`permits`], and only there.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::time::Instant;
use tonic::{Extensions, Request, Status};
use weft_identity::certificate::PeerIdentity;
use weft_identity::introduction::{AS, Binding};
use weft_identity::spiffe::{Role, SpiffeId, Subject};
use weft_model::{InstanceId, Timestamp};

use crate::Clock;
use crate::outlet::Outlet;
use crate::status::ApiError;

/// What somebody is told whose leaf ended while it was connected.
pub(crate) const LEAF_ENDED: &str = "the client certificate ended; connect again with a renewed one";

/// Who may be introduced on one connection: more sidecars than a machine has.
const INTRODUCED_MAX: usize = 1_024;

/// The other end of a connection, as the listener found it; or, of those who were introduced there, whose call it is.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where it is.
    pub address: SocketAddr,
    /// What its verified leaf says; none if it presented none.
    pub identity: Option<Arc<PeerIdentity>>,
    /// What tells the connection from others.
    pub binding: Binding,
    /// Who else is on the connection.
    pub introduced: Introduced,
    /// Whether it takes what is written to it.
    pub outlet: Outlet,
}

/// Who was introduced on a connection, in this order. Clones are of the same connection.
#[derive(Clone, Debug, Default)]
pub struct Introduced(Arc<Mutex<Vec<Arc<PeerIdentity>>>>);

impl Introduced {
    /// Adds somebody whose proof was checked, and gives the number for [`AS`].
    ///
    /// # Errors
    /// There are enough.
    pub(crate) fn add(&self, identity: PeerIdentity) -> Result<u32, ApiError> {
        let mut introduced = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever has a newer leaf takes the place of its older one.
        let place = introduced.iter().position(|known| known.id == identity.id);
        let place = place.unwrap_or(introduced.len());
        if place == INTRODUCED_MAX {
            let message = format!("{INTRODUCED_MAX} are introduced on this connection; open another one");
            return Err(ApiError::Denied(message));
        }
        match introduced.get_mut(place) {
            Some(known) => *known = Arc::new(identity),
            None => introduced.push(Arc::new(identity)),
        }
        Ok(u32::try_from(place).unwrap_or(u32::MAX))
    }

    fn get(&self, number: u32) -> Option<Arc<PeerIdentity>> {
        let introduced = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        introduced.get(usize::try_from(number).ok()?).cloned()
    }
}

/// Puts whoever a call says that it is of in the place of the connection's own peer.
///
/// # Errors
/// Nobody of that number was introduced.
pub(crate) fn speak_as(mut request: Request<()>) -> Result<Request<()>, Status> {
    let Some(number) = request.metadata().get(AS) else { return Ok(request) };
    let number = number.to_str().ok().and_then(|number| number.parse().ok());
    let peer = request.extensions().get::<Peer>();
    let identity = peer.zip(number).and_then(|(peer, number)| peer.introduced.get(number));
    let Some((peer, identity)) = peer.zip(identity) else {
        metrics::counter!("weft_api_refused_total", "reason" => "not_introduced").increment(1);
        return Err(ApiError::Unauthenticated(format!("{AS} names nobody who was introduced here")).into());
    };
    let peer = Peer { identity: Some(identity), ..peer.clone() };
    request.extensions_mut().insert(peer);
    Ok(request)
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
        let Some(PeerIdentity { id, not_after, .. }) = identity.map(|identity| &**identity) else {
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

    fn peer(address: &str) -> Peer {
        let (binding, introduced) = (Binding::default(), Introduced::default());
        let outlet = Outlet::default();
        Peer { address: address.parse().unwrap(), identity: None, binding, introduced, outlet }
    }

    fn identity(instance: usize, serial: &str) -> PeerIdentity {
        let id = format!("spiffe://weft.test/ns/default/svc/api/inst/api-{instance}").parse().unwrap();
        PeerIdentity {
            id,
            serial: serial.to_owned(),
            not_before: Timestamp(0),
            not_after: Timestamp(i64::MAX),
            public_key_sha256: weft_identity::fingerprint::Fingerprint::of_public_key(serial.as_bytes()),
        }
    }

    #[test]
    fn a_call_is_of_whoever_was_introduced_by_that_number_and_else_of_nobody() {
        let peer = peer("192.0.2.7:1");
        assert_eq!(peer.introduced.add(identity(1, "1")).unwrap(), 0);
        assert_eq!(peer.introduced.add(identity(2, "1")).unwrap(), 1);
        // With a newer leaf.
        assert_eq!(peer.introduced.add(identity(1, "2")).unwrap(), 0);
        let caller = |number: Option<&'static str>| {
            let mut request = Request::new(());
            request.extensions_mut().insert(peer.clone());
            if let Some(number) = number {
                request.metadata_mut().insert(AS, number.parse().unwrap());
            }
            let request = speak_as(request).map_err(|status| status.code())?;
            Ok(request.extensions().get::<Peer>().unwrap().identity.clone())
        };
        assert_eq!(caller(None), Ok(None));
        assert_eq!(*caller(Some("0")).unwrap().unwrap(), identity(1, "2"));
        assert_eq!(*caller(Some("1")).unwrap().unwrap(), identity(2, "1"));
        for nobody in ["2", "-1", "", "one", "4294967296"] {
            assert_eq!(caller(Some(nobody)), Err(tonic::Code::Unauthenticated), "{nobody}");
        }
    }

    #[test]
    fn introductions_are_bounded() {
        let introduced = Introduced::default();
        for instance in 0..INTRODUCED_MAX {
            introduced.add(identity(instance, "1")).unwrap();
        }
        assert!(matches!(introduced.add(identity(INTRODUCED_MAX, "1")), Err(ApiError::Denied(_))));
        introduced.add(identity(0, "2")).unwrap();
    }

    fn operator(role: Role) -> Subject {
        Subject::Operator { role, name: "ann".parse().unwrap() }
    }

    #[test]
    fn a_network_is_an_address_or_half_of_one() {
        let network = |address: &str| peer(address).network();
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
