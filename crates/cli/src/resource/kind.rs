//! The kinds of resources and the words for them.

use crate::resource::fields::suggestion;
use std::str::FromStr;
use weft_proto::v1;

/// A kind of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Service,
    Instance,
    TrafficPolicy,
    SecurityPolicy,
    MeshDefaults,
}

impl Kind {
    pub(crate) const ALL: [Self; 5] =
        [Self::Service, Self::Instance, Self::TrafficPolicy, Self::SecurityPolicy, Self::MeshDefaults];

    /// The word in `kind:`.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::Instance => "Instance",
            Self::TrafficPolicy => "TrafficPolicy",
            Self::SecurityPolicy => "SecurityPolicy",
            Self::MeshDefaults => "MeshDefaults",
        }
    }

    /// What it may be called on the command line, the usual word first.
    pub(crate) const fn aliases(self) -> &'static [&'static str] {
        match self {
            Self::Service => &["services", "service", "svc"],
            Self::Instance => &["instances", "instance", "inst"],
            Self::TrafficPolicy => &["traffic", "trafficpolicy", "trafficpolicies"],
            Self::SecurityPolicy => &["security", "securitypolicy", "securitypolicies"],
            Self::MeshDefaults => &["mesh", "meshdefaults", "defaults"],
        }
    }

    pub(crate) const fn wire(self) -> v1::Kind {
        match self {
            Self::Service => v1::Kind::Service,
            Self::Instance => v1::Kind::Instance,
            Self::TrafficPolicy => v1::Kind::TrafficPolicy,
            Self::SecurityPolicy => v1::Kind::SecurityPolicy,
            Self::MeshDefaults => v1::Kind::MeshDefaults,
        }
    }

    /// The name as a controller knows it: a bare service is in the default namespace, as people type it.
    pub(crate) fn full_name(self, name: &str) -> String {
        let slashes = name.matches('/').count();
        match self {
            Self::Service | Self::TrafficPolicy => name
                .split("->")
                .map(|part| if part.contains('/') { part.to_owned() } else { format!("default/{part}") })
                .collect::<Vec<_>>()
                .join("->"),
            Self::Instance if slashes == 1 => format!("default/{name}"),
            // A bare word may be a namespace here, so nothing is guessed.
            Self::SecurityPolicy | Self::Instance | Self::MeshDefaults => name.to_owned(),
        }
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.to_lowercase();
        let kind = Self::ALL.into_iter().find(|kind| kind.aliases().contains(&text.as_str()));
        kind.ok_or_else(|| {
            let usual: Vec<&str> = Self::ALL.iter().map(|kind| kind.aliases()[0]).collect();
            format!("unknown kind; {}", suggestion(&text, &usual))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_known_by_all_its_words() {
        for kind in Kind::ALL {
            assert_eq!(kind.word().parse(), Ok(kind));
            for alias in kind.aliases() {
                assert_eq!(alias.parse(), Ok(kind));
            }
        }
        assert!("servise".parse::<Kind>().unwrap_err().contains("did you mean \"services\"?"));
    }

    #[test]
    fn names_are_completed_where_that_is_no_guess() {
        assert_eq!(Kind::Service.full_name("db"), "default/db");
        assert_eq!(Kind::Instance.full_name("db/db-1"), "default/db/db-1");
        assert_eq!(Kind::TrafficPolicy.full_name("web->shop/api"), "default/web->shop/api");
        assert_eq!(Kind::SecurityPolicy.full_name("shop"), "shop");
    }
}
