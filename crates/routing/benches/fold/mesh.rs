//! A made-up mesh's life, as the log would have stored it.

use std::collections::BTreeMap;
use weft_model::{Epoch, Position, StoredEvent, Timestamp, Version};

/// An event as it is stored.
pub(crate) struct Stored {
    pub(crate) position: u64,
    pub(crate) version: u64,
    pub(crate) scope: String,
    pub(crate) event_type: &'static str,
    pub(crate) schema: u16,
    pub(crate) actor: String,
    pub(crate) payload: String,
}

impl Stored {
    /// As the log hands it out.
    pub(crate) fn view(&self) -> StoredEvent<'_> {
        StoredEvent {
            epoch: Epoch(1),
            position: Position(self.position),
            version: Version(self.version),
            at: Timestamp(1_700_000_000_000 + self.position.cast_signed()),
            actor: &self.actor,
            scope: &self.scope,
            event_type: self.event_type,
            schema: self.schema,
            payload: &self.payload,
        }
    }
}

/// The first `count` events, or as many as it takes to bring the mesh up if those are more.
pub(crate) fn events(services: usize, instances: usize, count: usize) -> Vec<Stored> {
    let mut life = Life {
        services,
        instances,
        rng: Rng(0x5eed),
        versions: BTreeMap::new(),
        events: Vec::new(),
        revision: 0,
    };
    life.begin();
    while life.events.len() < count {
        life.go_on();
    }
    life.events
}

struct Life {
    services: usize,
    instances: usize,
    rng: Rng,
    versions: BTreeMap<String, u64>,
    events: Vec<Stored>,
    revision: u64,
}

impl Life {
    fn begin(&mut self) {
        let root = format!(
            "{{\"trust_domain\":\"weft.local\",\"certificate_pem\":\"{}\",\"sha256\":\"{}\"}}",
            "x".repeat(700),
            self.rng.hex(64)
        );
        self.push("ca".into(), "RootAdded", root);
        for service in 0..self.services {
            self.declare(service);
        }
        for service in 0..self.services {
            self.security(service);
            for instance in 0..self.instances {
                self.token(service, instance);
                self.leaf(service, instance);
                self.register(service, instance);
                self.health(service, instance);
            }
        }
    }

    fn go_on(&mut self) {
        let (service, instance) = (self.rng.below(self.services), self.rng.below(self.instances));
        match self.rng.below(1_000) {
            0..760 => self.health(service, instance),
            760..850 => self.leaf(service, instance),
            850..900 => self.register(service, instance),
            900..930 => self.push(scope("membership", service, instance), "InstanceDraining", "{}".into()),
            930..950 => {
                self.push(scope("membership", service, instance), "InstanceDeregistered", "{}".into());
                self.register(service, instance);
                self.health(service, instance);
            }
            950..975 => self.token(service, instance),
            975..987 => self.traffic(service),
            987..997 => self.security(service),
            _ => self.declare(service),
        }
    }

    fn push(&mut self, scope: String, event_type: &'static str, payload: String) {
        let version = self.versions.entry(scope.clone()).or_default();
        *version += 1;
        let position = self.events.len() as u64 + 1;
        let actor = match scope.split_once('/') {
            Some(("health" | "membership" | "identity", instance)) => {
                format!("spiffe://weft.local/instance/{instance}")
            }
            _ => "spiffe://weft.local/operator/admin/tess".to_owned(),
        };
        self.events.push(Stored {
            position,
            version: *version,
            scope,
            event_type,
            schema: 1,
            actor,
            payload,
        });
    }

    fn declare(&mut self, service: usize) {
        let port = 8_000 + self.rng.below(4);
        let ports = format!(
            "{{\"ports\":[{{\"name\":\"main\",\"port\":{port}}},{{\"name\":\"admin\",\"port\":9000}}]}}"
        );
        self.push(format!("service/{}", name(service)), "ServiceDeclared", ports);
    }

    fn register(&mut self, service: usize, instance: usize) {
        // The upstreams belong to the service, so its instances are of one class.
        let upstreams: Vec<String> =
            (1..6).map(|step| format!("\"{}\"", name((service + step * 37) % self.services))).collect();
        let address = format!("10.{}.{}.{}", service / 250, service % 250, instance % 250);
        let payload = format!(
            "{{\"address\":\"{address}\",\"port\":{},\"upstreams\":{{\"only\":[{}]}},\"metadata\":{{\"build\":\"2026.11.{}\",\"zone\":\"z{}\"}}}}",
            15_000 + self.rng.below(3),
            upstreams.join(","),
            self.rng.below(30),
            instance % 3
        );
        self.push(scope("membership", service, instance), "InstanceRegistered", payload);
    }

    fn health(&mut self, service: usize, instance: usize) {
        self.revision += 1;
        let (word, detail) = match self.rng.below(3) {
            0 => (
                "unhealthy",
                "connect 127.0.0.1:8080: connection refused; three of three attempts failed within 250 ms",
            ),
            _ => (
                "healthy",
                "accepted a connection at 127.0.0.1:8080 after 1 ms; the last failure was some hours ago",
            ),
        };
        let payload = format!(
            "{{\"health\":\"{word}\",\"revision\":{},\"detail\":\"{detail}; probe {} of this sidecar, pid {}\"}}",
            self.revision,
            self.rng.below(100_000),
            self.rng.below(30_000)
        );
        self.push(scope("health", service, instance), "HealthReported", payload);
    }

    fn leaf(&mut self, service: usize, instance: usize) {
        let from = 1_700_000_000_000 + self.events.len();
        let payload = format!(
            "{{\"serial\":\"{}\",\"public_key_sha256\":\"{}\",\"not_before\":{from},\"not_after\":{}}}",
            self.rng.hex(32),
            self.rng.hex(64),
            from + 3_600_000
        );
        self.push(scope("identity", service, instance), "LeafIssued", payload);
    }

    fn token(&mut self, service: usize, instance: usize) {
        let token = format!("token/{}", self.rng.hex(32));
        let payload = format!(
            "{{\"secret_sha256\":\"{}\",\"service\":\"{}\",\"expires_at\":{}}}",
            self.rng.hex(64),
            name(service),
            1_700_000_000_000 + self.events.len()
        );
        self.push(token.clone(), "JoinTokenCreated", payload);
        let payload = format!("{{\"instance\":\"{}/{}\"}}", name(service), instance_name(service, instance));
        self.push(token, "JoinTokenRedeemed", payload);
    }

    fn traffic(&mut self, service: usize) {
        let payload = format!(
            "{{\"policy\":{{\"balance\":\"round_robin\",\"connect\":{{\"timeout_ms\":{},\"retries\":2}}}}}}",
            1_000 + self.rng.below(500)
        );
        self.push(format!("traffic/{}", name(service)), "TrafficPolicySet", payload);
    }

    fn security(&mut self, service: usize) {
        let payload = format!(
            "{{\"policy\":{{\"default\":\"deny\",\"mode\":\"enforce\",\"rules\":[{{\"name\":\"r{}\",\"action\":\"allow\",\"from\":{{\"services\":[\"{}\",\"{}\"]}},\"ports\":[8000]}}]}}}}",
            self.rng.below(9),
            name(service),
            name((service + 1) % self.services)
        );
        self.push(format!("security/{}", name(service)), "SecurityPolicySet", payload);
    }
}

fn name(service: usize) -> String {
    format!("{}/service-{service}", ["shop", "billing", "search", "platform"][service % 4])
}

fn instance_name(service: usize, instance: usize) -> String {
    format!("service-{service}-{instance}")
}

fn scope(kind: &str, service: usize, instance: usize) -> String {
    format!("{kind}/{}/{}", name(service), instance_name(service, instance))
}

/// SplitMix64: seeded, the same everywhere.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }

    fn hex(&mut self, digits: usize) -> String {
        (0..digits).map(|_| char::from_digit(u32::try_from(self.next() % 16).unwrap(), 16).unwrap()).collect()
    }
}
