//! What a query is answered, if the mesh answers it. Pure: a query and a snapshot in, an answer out.
//!
//! A service is a name of three labels, `<service>.<namespace>.weft`; it has one address (A) and nothing else. Whatever else is asked
//! of a name that exists has no data; what does not exist is said not to (RFC 8020: what is below exists with what is above).
//! Negative answers carry the zone's SOA with the same short lifetime, so a service that is declared now is found in seconds
//! (RFC 2308). Before there is a snapshot nothing is known, and a failure is said instead of a "no" that would be believed.

use crate::listeners::Reach;
use hickory_proto::op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use std::net::Ipv4Addr;
use weft_model::{ServiceName, dns_name};
use weft_routing::Snapshot;

/// The last label of every mesh name.
const ZONE: &[u8] = dns_name::ZONE.as_bytes();

/// How long an answer may be kept, in seconds. Addresses of services are stable; what changes is whether there is one.
const TTL: u32 = 5;

/// What of an answer is taken over UDP from who offers nothing larger is 512 bytes; what is offered in turn is what fits into
/// any network's packets (the DNS flag day of 2020).
const PAYLOAD: u16 = 1232;

/// Bytes of a message's header.
const HEADER: usize = 12;

/// What is to be done with a query.
#[derive(Debug)]
pub(super) enum Asked {
    /// It is answered so; the word is for the metric.
    Answer(Vec<u8>, &'static str),
    /// Somebody else knows.
    Forward(Question),
    /// It is no query.
    Nothing(&'static str),
}

/// A query that is forwarded.
#[derive(Debug)]
pub(super) struct Question {
    /// The whole message, as it came.
    pub(super) message: Vec<u8>,
    /// Where its question ends.
    pub(super) end: usize,
    header: Metadata,
    query: Query,
}

impl Question {
    /// Says that no answer can be had.
    pub(super) fn failure(&self) -> Vec<u8> {
        encode(&reply(&self.header, Some(self.query.clone()), ResponseCode::ServFail))
    }
}

/// Answers a query, or tells that it is not the mesh's to answer.
///
/// `taken` says which addresses lead to somebody else: they are not given away, for what listens there would act in another name.
pub(super) fn answer(
    message: &[u8],
    snapshot: Option<&Snapshot>,
    reach: &Reach,
    taken: impl Fn(Ipv4Addr) -> bool,
) -> Asked {
    let mut decoder = BinDecoder::new(message);
    let Ok(Header { metadata: header, counts, .. }) = Header::read(&mut decoder) else {
        return Asked::Nothing("malformed");
    };
    if header.message_type != MessageType::Query {
        return Asked::Nothing("malformed");
    }
    // One question; anything else means nothing (RFC 9619).
    let question = (counts.queries == 1).then(|| Query::read(&mut decoder).ok()).flatten();
    let Some(query) = question else {
        return Asked::Answer(encode(&reply(&header, None, ResponseCode::FormErr)), "malformed");
    };
    let labels: Vec<_> = query.name().iter().map(<[u8]>::to_ascii_lowercase).collect();
    if labels.last().map(Vec::as_slice) != Some(ZONE) {
        let end = decoder.index().max(HEADER);
        return Asked::Forward(Question { message: message.to_vec(), end, header, query });
    }
    let Ok(whole) = Message::from_vec(message) else {
        return Asked::Answer(encode(&reply(&header, Some(query), ResponseCode::FormErr)), "malformed");
    };
    let (mut reply, result) = mesh_answer(&header, query, &labels, snapshot, reach, taken);
    if whole.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(PAYLOAD);
        reply.set_edns(edns);
    }
    Asked::Answer(encode(&reply), result)
}

/// What a mesh name is.
enum Found {
    Service(Ipv4Addr),
    /// The zone itself.
    Zone,
    /// There are names below it.
    Above,
    Nothing,
}

fn mesh_answer(
    header: &Metadata,
    query: Query,
    labels: &[Vec<u8>],
    snapshot: Option<&Snapshot>,
    reach: &Reach,
    taken: impl Fn(Ipv4Addr) -> bool,
) -> (Message, &'static str) {
    if header.op_code != OpCode::Query {
        return (reply(header, Some(query), ResponseCode::NotImp), "refused");
    }
    if query.query_class() != DNSClass::IN {
        return (reply(header, Some(query), ResponseCode::Refused), "refused");
    }
    let Some(snapshot) = snapshot else {
        return (reply(header, Some(query), ResponseCode::ServFail), "no_snapshot");
    };
    let (name, kind) = (query.name().clone(), query.query_type());
    let found = find(labels, snapshot, reach);
    if matches!(found, Found::Service(address) if taken(address)) {
        return (reply(header, Some(query), ResponseCode::ServFail), "taken");
    }
    let code = if matches!(found, Found::Nothing) { ResponseCode::NXDomain } else { ResponseCode::NoError };
    let mut reply = reply(header, Some(query), code);
    reply.metadata.authoritative = true;
    let result = match (found, kind) {
        (Found::Service(address), RecordType::A | RecordType::ANY) => {
            reply.add_answer(Record::from_rdata(name, TTL, RData::A(A(address))));
            return (reply, "answered");
        }
        (Found::Zone, RecordType::SOA | RecordType::ANY) => {
            reply.add_answer(authority(snapshot));
            return (reply, "answered");
        }
        (Found::Service(_) | Found::Zone | Found::Above, _) => "nodata",
        (Found::Nothing, _) => "nxdomain",
    };
    reply.add_authority(authority(snapshot));
    (reply, result)
}

fn find(labels: &[Vec<u8>], snapshot: &Snapshot, reach: &Reach) -> Found {
    let text = |label: &Vec<u8>| String::from_utf8(label.clone()).ok();
    match labels {
        [_] => Found::Zone,
        [namespace, _] => {
            let there =
                |service: &ServiceName| Some(service.namespace.as_str()) == text(namespace).as_deref();
            let mut shards = snapshot.endpoints.values();
            let any = shards.any(|shard| {
                shard.address.is_some() && there(&shard.service) && reach.contains(&shard.service)
            });
            if any { Found::Above } else { Found::Nothing }
        }
        [service, namespace, _] => {
            let name = text(service).zip(text(namespace));
            let name = name.and_then(|(service, namespace)| format!("{namespace}/{service}").parse().ok());
            name.filter(|name| reach.contains(name))
                .and_then(|name: ServiceName| snapshot.endpoints.get(&name)?.address)
                .map_or(Found::Nothing, Found::Service)
        }
        _ => Found::Nothing,
    }
}

/// The zone's SOA. Its serial is the log position that the answer is of.
#[expect(clippy::cast_possible_truncation, reason = "serials are compared modulo 2^32 (RFC 1982)")]
fn authority(snapshot: &Snapshot) -> Record {
    let named = |labels: &[&[u8]]| Name::from_labels(labels.iter().copied()).unwrap_or_default();
    let zone = named(&[ZONE]);
    let second = TTL.cast_signed();
    let serial = snapshot.version.position.0 as u32;
    let soa = SOA::new(zone.clone(), named(&[b"hostmaster", ZONE]), serial, second, second, second, TTL);
    Record::from_rdata(zone, TTL, RData::SOA(soa))
}

fn reply(header: &Metadata, query: Option<Query>, code: ResponseCode) -> Message {
    let mut reply = Message::response(header.id, header.op_code);
    reply.metadata.recursion_desired = header.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    reply.add_queries(query);
    reply
}

/// A name that was read can be written: nothing here is larger than what came.
fn encode(reply: &Message) -> Vec<u8> {
    reply.to_vec().unwrap_or_default()
}

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;
    use weft_routing::fixture;

    fn snapshot() -> Snapshot {
        fixture::snapshot(&"default/web/web-1".parse().unwrap())
    }

    fn query(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    fn asked(message: &Message) -> Message {
        match answer(&message.to_vec().unwrap(), Some(&snapshot()), &Reach::everything(), |_| false) {
            Asked::Answer(bytes, _) => Message::from_vec(&bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// A service of the fixture, and its address.
    fn service() -> (String, Ipv4Addr) {
        let snapshot = snapshot();
        let shard = snapshot.endpoints.values().find(|shard| shard.address.is_some()).unwrap();
        (format!("{}.{}", shard.service.name, shard.service.namespace), shard.address.unwrap())
    }

    #[test]
    fn a_service_has_its_address_and_nothing_else() {
        let (service, address) = service();
        let reply = asked(&query(&format!("{service}.WEFT."), RecordType::A));
        assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
        assert_eq!(reply.metadata.id, 7);
        assert!(reply.metadata.authoritative && reply.metadata.recursion_available);
        let [record] = &reply.answers[..] else { panic!("{reply:?}") };
        assert_eq!((&record.data, record.ttl), (&RData::A(A(address)), TTL));
        // As it was asked, so that who plays with the case to know its answer again is served.
        assert_eq!(record.name.to_ascii(), format!("{service}.WEFT."));
        for kind in [RecordType::AAAA, RecordType::TXT, RecordType::HTTPS] {
            let reply = asked(&query(&format!("{service}.weft."), kind));
            assert_eq!((reply.metadata.response_code, reply.answers.len()), (ResponseCode::NoError, 0));
            assert_eq!(reply.authorities[0].record_type(), RecordType::SOA);
        }
    }

    #[test]
    fn what_does_not_exist_is_said_not_to_and_what_is_above_it_exists() {
        let (service, _) = service();
        let (_, namespace) = service.split_once('.').unwrap();
        for (name, code) in [
            ("nobody.default.weft.".to_owned(), ResponseCode::NXDomain),
            (format!("x.{service}.weft."), ResponseCode::NXDomain),
            ("nowhere.weft.".to_owned(), ResponseCode::NXDomain),
            ("a_b.default.weft.".to_owned(), ResponseCode::NXDomain),
            (format!("{namespace}.weft."), ResponseCode::NoError),
            ("weft.".to_owned(), ResponseCode::NoError),
        ] {
            let reply = asked(&query(&name, RecordType::A));
            assert_eq!((reply.metadata.response_code, reply.answers.len()), (code, 0), "{name}");
            assert_eq!(reply.authorities.len(), 1, "{name}");
        }
    }

    #[test]
    fn a_service_that_is_no_upstream_is_none() {
        let (service, _) = service();
        let message = query(&format!("{service}.weft."), RecordType::A).to_vec().unwrap();
        let Asked::Answer(_, result) = answer(&message, Some(&snapshot()), &Reach::only([]), |_| false)
        else {
            panic!("forwarded")
        };
        assert_eq!(result, "nxdomain");
    }

    #[test]
    fn an_address_that_leads_to_somebody_else_is_not_given_away() {
        let (service, address) = service();
        let message = query(&format!("{service}.weft."), RecordType::A).to_vec().unwrap();
        let everything = Reach::everything();
        let asked = answer(&message, Some(&snapshot()), &everything, |taken| taken == address);
        let Asked::Answer(bytes, "taken") = asked else { panic!("{asked:?}") };
        let reply = Message::from_vec(&bytes).unwrap();
        assert_eq!((reply.metadata.response_code, reply.answers.len()), (ResponseCode::ServFail, 0));
    }

    #[test]
    fn before_a_snapshot_nothing_is_denied() {
        let message = query("db.default.weft.", RecordType::A).to_vec().unwrap();
        let Asked::Answer(bytes, "no_snapshot") = answer(&message, None, &Reach::everything(), |_| false)
        else {
            panic!("answered")
        };
        assert_eq!(Message::from_vec(&bytes).unwrap().metadata.response_code, ResponseCode::ServFail);
    }

    #[test]
    fn everything_else_is_forwarded_as_it_came() {
        for name in ["example.org.", "weft.example.org.", "default.weft.example.", "."] {
            let message = query(name, RecordType::A).to_vec().unwrap();
            let Asked::Forward(question) = answer(&message, None, &Reach::everything(), |_| false) else {
                panic!("{name}")
            };
            assert_eq!((question.message, question.end), (message.clone(), message.len()));
        }
    }

    #[test]
    fn extensions_are_answered_with_extensions() {
        let mut message = query("nobody.default.weft.", RecordType::A);
        assert!(asked(&message).edns.is_none());
        message.set_edns(Edns::new());
        assert_eq!(asked(&message).edns.unwrap().max_payload(), PAYLOAD);
    }

    #[test]
    fn what_is_no_query_is_not_answered_and_nonsense_is_said_to_be_such() {
        let everything = Reach::everything();
        let own = asked(&query("weft.", RecordType::A)).to_vec().unwrap();
        for bytes in [&b""[..], b"short", &own] {
            assert!(matches!(answer(bytes, None, &everything, |_| false), Asked::Nothing(_)), "{bytes:?}");
        }
        let mut two = query("weft.", RecordType::A);
        two.add_query(Query::query(Name::root(), RecordType::NS));
        assert_eq!(asked(&two).metadata.response_code, ResponseCode::FormErr);
        let mut update = query("weft.", RecordType::SOA);
        update.metadata.op_code = OpCode::Update;
        assert_eq!(asked(&update).metadata.response_code, ResponseCode::NotImp);
    }
}
