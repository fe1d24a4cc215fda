//! How large a fleet is, and who is interested in what.

use std::net::Ipv4Addr;
use std::sync::Arc;
use weft_model::{InstanceId, Namespace, ServiceName};
use weft_proto::v1;
use weft_proto::v1::change::Change as Wire;

use crate::Mesh;
use crate::error::FleetError;
use crate::line::Line;
use crate::member::Member;
use crate::reader::{Reader, Reading};

/// Instances of a service that is nobody's upstream: so many that services stay few, and so few that each stays small.
const GROUP: usize = 100;
/// More would not fit the addresses that simulated endpoints have.
const SIDECARS_MAX: usize = 1 << 20;
/// Where simulated endpoints say that they are. Nothing listens there.
const ADDRESSES: Ipv4Addr = Ipv4Addr::new(127, 96, 0, 1);
const PORT: u32 = 15_000;

/// A fleet of one target service, whose endpoints change, and of groups of sidecars, some of which have it for their upstream.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where its services are. Nothing else should be there.
    pub namespace: Namespace,
    /// Sidecars, besides those of the target's endpoints.
    pub sidecars: usize,
    /// Endpoints of the target service. Each has a sidecar, which has no upstream.
    pub endpoints: usize,
    /// Sidecars that have the target for their upstream. The others have none.
    pub interested: usize,
    /// Other services that those have for their upstreams.
    pub also: Vec<ServiceName>,
    /// Sidecars on one connection; with 1, each has its own.
    pub per_connection: usize,
    /// How they read what they are sent.
    pub reading: Reading,
}

impl Plan {
    /// The service whose endpoints change.
    ///
    /// # Errors
    /// None: `target` is a name.
    pub fn target(&self) -> Result<ServiceName, FleetError> {
        self.service("target")
    }

    fn service(&self, name: &str) -> Result<ServiceName, FleetError> {
        let name = name.parse().map_err(|error| FleetError::Plan(format!("{name}: {error}")))?;
        Ok(ServiceName { namespace: self.namespace.clone(), name })
    }

    fn check(&self) -> Result<(), FleetError> {
        let wrong = |why: String| Err(FleetError::Plan(why));
        match self {
            Self { endpoints: 0, .. } => wrong("the target service needs an endpoint".into()),
            Self { per_connection: 0, .. } => wrong("a connection is of at least one sidecar".into()),
            Self { sidecars, endpoints, .. } if sidecars.saturating_add(*endpoints) > SIDECARS_MAX => {
                wrong(format!("a fleet has at most {SIDECARS_MAX} sidecars"))
            }
            Self { sidecars, interested, .. } if !(1..=*sidecars).contains(interested) => wrong(format!(
                "1 to {sidecars} of the {sidecars} sidecars can be interested, not {interested}"
            )),
            Self { .. } => Ok(()),
        }
    }

    pub(crate) fn members(&self, mesh: &Mesh, reader: &Arc<Reader>) -> Result<Vec<Arc<Member>>, FleetError> {
        self.check()?;
        let target = self.target()?;
        let mut line = Arc::new(Line::new(mesh, address(0), reader));
        let mut members = Vec::with_capacity(self.size());
        for index in 0..self.size() {
            if index > 0 && index % self.per_connection == 0 {
                line = Arc::new(Line::new(mesh, address(index), reader));
            }
            let interested = self.near().contains(&index);
            let (service, number) = self.place(index)?;
            let upstreams =
                interested.then(|| std::iter::once(&target).chain(&self.also)).into_iter().flatten();
            let upstreams = upstreams.map(ToString::to_string).collect();
            let instance = format!("i{number}").parse();
            let instance =
                instance.map_err(|error| FleetError::Plan(format!("an instance's name: {error}")))?;
            let registration = v1::RegisterInstance {
                instance: InstanceId { service: service.clone(), instance }.to_string(),
                address: address(index).to_string(),
                port: PORT,
                upstreams,
                ..v1::RegisterInstance::default()
            };
            members.push(Arc::new(Member::new(index, interested, registration, Arc::clone(&line))?));
        }
        Ok(members)
    }

    /// The target's come first, then the interested ones, then the others.
    fn near(&self) -> std::ops::Range<usize> {
        self.endpoints..self.endpoints + self.interested
    }

    /// All sidecars.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.endpoints + self.sidecars
    }

    /// The service of a sidecar, and its number there.
    fn place(&self, index: usize) -> Result<(ServiceName, usize), FleetError> {
        if index < self.endpoints {
            return Ok((self.target()?, index));
        }
        let near = self.near();
        let (kind, first) = if near.contains(&index) { ("near", near.start) } else { ("far", near.end) };
        let number = index - first;
        Ok((self.service(&format!("{kind}{}", number / GROUP))?, number % GROUP))
    }

    fn services(&self) -> Result<Vec<ServiceName>, FleetError> {
        let mut services: Vec<_> =
            (0..self.size()).map(|index| Ok(self.place(index)?.0)).collect::<Result<_, FleetError>>()?;
        services.dedup();
        Ok(services)
    }

    pub(crate) fn declarations(&self) -> Result<Vec<Wire>, FleetError> {
        let declare = |service: ServiceName| {
            Wire::DeclareService(v1::DeclareService {
                name: service.to_string(),
                ports: vec![v1::ServicePort { name: "main".into(), port: 80 }],
                address: String::new(),
            })
        };
        Ok(self.services()?.into_iter().map(declare).collect())
    }

    pub(crate) fn deletions(&self) -> Vec<Wire> {
        let delete =
            |service: ServiceName| Wire::DeleteService(v1::DeleteService { name: service.to_string() });
        // A plan that was carried out has services.
        self.services().unwrap_or_default().into_iter().map(delete).collect()
    }
}

fn address(index: usize) -> Ipv4Addr {
    // Bounded by SIDECARS_MAX.
    Ipv4Addr::from_bits(ADDRESSES.to_bits() + u32::try_from(index).unwrap_or(u32::MAX >> 8))
}
