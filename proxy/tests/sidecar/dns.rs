//! Names: what the mesh answers, what others answer, and who is asked.

use crate::support::{App, Controller, LIMIT, Sidecar};
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use weft_testkit::{reserve_loopback_port, wait_until};

const LOCAL: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

fn query(id: u16, name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

async fn by_udp(server: SocketAddr, query: &Message) -> Vec<u8> {
    let socket = UdpSocket::bind(LOCAL).await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(&query.to_vec().unwrap()).await.unwrap();
    let mut answer = vec![0; 65_535];
    let length = timeout(LIMIT, socket.recv(&mut answer)).await.expect("an answer").unwrap();
    answer.truncate(length);
    answer
}

async fn by_tcp(stream: &mut TcpStream, query: &Message) -> Vec<u8> {
    let bytes = query.to_vec().unwrap();
    stream.write_u16(bytes.len().try_into().unwrap()).await.unwrap();
    stream.write_all(&bytes).await.unwrap();
    let mut answer = vec![0; timeout(LIMIT, stream.read_u16()).await.unwrap().unwrap().into()];
    stream.read_exact(&mut answer).await.unwrap();
    answer
}

fn read(bytes: &[u8]) -> Message {
    Message::from_vec(bytes).unwrap()
}

/// A nameserver that answers every query with one record, and says what it was asked. Before each answer over UDP it sends others
/// that nobody asked for.
struct Nameserver {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Vec<u8>>>>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

const TRUE_WORD: &str = "the nameserver's own";

fn answer_to(bytes: &[u8], word: &str) -> Message {
    let query = read(bytes);
    let mut answer = Message::response(query.metadata.id, OpCode::Query);
    answer.metadata.authentic_data = true;
    let name = query.queries[0].name().clone();
    answer.add_queries(query.queries);
    answer.add_answer(Record::from_rdata(name, 1234, RData::TXT(TXT::new(vec![word.to_owned()]))));
    answer
}

impl Nameserver {
    async fn start() -> Self {
        let tcp = TcpListener::bind(LOCAL).await.unwrap();
        let address = tcp.local_addr().unwrap();
        let udp = UdpSocket::bind(address).await.unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (heard, heard_too) = (Arc::clone(&asked), Arc::clone(&asked));
        let tracker = TaskTracker::new();
        let datagrams = tracker.spawn(async move {
            let mut buffer = vec![0; 65_535];
            while let Ok((length, client)) = udp.recv_from(&mut buffer).await {
                let query = &buffer[..length];
                heard.lock().unwrap().push(query.to_vec());
                let mut other_id = answer_to(query, "a lie");
                other_id.metadata.id ^= 1;
                let mut other_question = answer_to(query, "a lie");
                other_question.queries[0].set_query_type(RecordType::MX);
                let mut no_answer = answer_to(query, "a lie");
                no_answer.metadata.message_type = MessageType::Query;
                let stranger = UdpSocket::bind(LOCAL).await.unwrap();
                stranger.send_to(&answer_to(query, "a lie").to_vec().unwrap(), client).await.unwrap();
                for message in [other_id, other_question, no_answer, answer_to(query, TRUE_WORD)] {
                    udp.send_to(&message.to_vec().unwrap(), client).await.unwrap();
                }
            }
        });
        let streams = tracker.spawn(async move {
            while let Ok((mut stream, _)) = tcp.accept().await {
                let Ok(length) = stream.read_u16().await else { continue };
                let mut query = vec![0; length.into()];
                stream.read_exact(&mut query).await.unwrap();
                heard_too.lock().unwrap().push(query.clone());
                let answer = answer_to(&query, TRUE_WORD).to_vec().unwrap();
                stream.write_u16(answer.len().try_into().unwrap()).await.unwrap();
                stream.write_all(&answer).await.unwrap();
            }
        });
        let tasks = [AbortOnDropHandle::new(datagrams), AbortOnDropHandle::new(streams)];
        Self { address, asked, _tasks: tasks }
    }
}

fn mesh() -> Controller {
    let controller = Controller::start();
    controller.declare("default/db", &[reserve_loopback_port()]);
    controller.declare("shop/orders", &[reserve_loopback_port()]);
    controller.declare("default/web", &[80]);
    controller.allow("default/db", &["default/web"]);
    controller
}

async fn sidecar(controller: &Controller, upstreams: Vec<SocketAddr>) -> (Sidecar, SocketAddr) {
    let sidecar = Sidecar::start(controller, "default/web/web-1", |config| {
        config.all_upstreams = true;
        config.loopback_addresses = true;
        config.dns_listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
        config.dns_upstreams = upstreams;
    })
    .await;
    let dns = sidecar.dns.unwrap();
    (sidecar, dns)
}

#[tokio::test]
async fn the_answer_to_a_services_name_leads_to_the_service() {
    let controller = Controller::start();
    let (app, port) = (App::named("!").await, reserve_loopback_port());
    controller.declare("default/db", &[port]);
    controller.declare("default/web", &[80]);
    controller.allow("default/db", &["default/web"]);
    let _db = Sidecar::serving(&controller, "default/db/db-1", port, app.address).await;
    let (web, dns) = sidecar(&controller, Vec::new()).await;
    web.ready().await;
    web.sees("default/db", 1).await;

    let mut stream = TcpStream::connect(dns).await.unwrap();
    let name = query(9, "db.default.weft.", RecordType::A);
    for bytes in [by_udp(dns, &name).await, by_tcp(&mut stream, &name).await] {
        let answer = read(&bytes);
        assert_eq!((answer.metadata.id, answer.metadata.response_code), (9, ResponseCode::NoError));
        let RData::A(A(address)) = answer.answers[0].data else { panic!("{answer:?}") };
        // Once ready, somebody listens there.
        let mut client = TcpStream::connect((address, port)).await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), b'!');
    }
    // The same connection serves the next query.
    let absent = read(&by_tcp(&mut stream, &query(10, "absent.default.weft.", RecordType::A)).await);
    assert_eq!((absent.metadata.id, absent.metadata.response_code), (10, ResponseCode::NXDomain));
    let six = read(&by_udp(dns, &query(11, "db.default.weft.", RecordType::AAAA)).await);
    assert_eq!((six.metadata.response_code, six.answers.len()), (ResponseCode::NoError, 0));
}

#[tokio::test]
async fn names_follow_the_mesh() {
    let controller = mesh();
    let (web, dns) = sidecar(&controller, Vec::new()).await;
    web.ready().await;
    let code =
        async || read(&by_udp(dns, &query(1, "late.shop.weft.", RecordType::A)).await).metadata.response_code;
    assert_eq!(code().await, ResponseCode::NXDomain);
    controller.declare("shop/late", &[80]);
    wait_until("the new name", LIMIT, async || code().await == ResponseCode::NoError).await;
}

#[tokio::test]
async fn without_a_snapshot_no_name_is_denied_and_none_is_asked_of_others() {
    let mut controller = mesh();
    controller.stop();
    let nameserver = Nameserver::start().await;
    let (_web, dns) = sidecar(&controller, vec![nameserver.address]).await;
    let answer = read(&by_udp(dns, &query(1, "db.default.weft.", RecordType::A)).await);
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    // Other names need no mesh.
    let other = read(&by_udp(dns, &query(2, "example.org.", RecordType::TXT)).await);
    assert_eq!(other.answers.len(), 1);
    assert_eq!(nameserver.asked.lock().unwrap().len(), 1, "a mesh name was asked of somebody else");
}

#[tokio::test]
async fn other_names_are_answered_by_the_nameserver_and_by_nobody_else() {
    let controller = mesh();
    let nameserver = Nameserver::start().await;
    let dead = crate::support::app::dead_address();
    let (web, dns) = sidecar(&controller, vec![dead, nameserver.address]).await;
    web.ready().await;
    let mut asked = query(77, "Mixed.Example.ORG.", RecordType::TXT);
    asked.metadata.checking_disabled = true;
    let mut stream = TcpStream::connect(dns).await.unwrap();
    let expected = answer_to(&asked.to_vec().unwrap(), TRUE_WORD).to_vec().unwrap();
    for bytes in [by_udp(dns, &asked).await, by_tcp(&mut stream, &asked).await] {
        assert_eq!(bytes, expected, "not as the nameserver answered");
    }
    for heard in nameserver.asked.lock().unwrap().iter() {
        assert_eq!(heard[2..], asked.to_vec().unwrap()[2..], "not as it was asked");
    }
    let metrics = web.page("/metrics").await.1;
    assert!(metrics.contains("weft_dns_queries_total{transport=\"tcp\",result=\"forwarded\"}"), "{metrics}");
}

#[tokio::test]
async fn a_nameserver_that_is_gone_is_told_as_a_failure() {
    let controller = mesh();
    let dead = crate::support::app::dead_address();
    let (_web, dns) = sidecar(&controller, vec![dead]).await;
    let answer = read(&by_udp(dns, &query(5, "example.org.", RecordType::A)).await);
    assert_eq!((answer.metadata.id, answer.metadata.response_code), (5, ResponseCode::ServFail));
    assert_eq!(answer.queries.len(), 1);
}

#[tokio::test]
async fn a_used_address_is_named() {
    let controller = mesh();
    let taken = UdpSocket::bind(LOCAL).await.unwrap().local_addr().unwrap();
    let _squatter = UdpSocket::bind(taken).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut config = crate::support::sidecar::config(&controller, "default/web/web-1", dir.path());
    config.dns_listen = Some(taken);
    let Err(error) = weft_proxy::Proxy::bind(config, crate::support::sidecar::metrics()).await else {
        panic!("bound twice");
    };
    assert!(error.to_string().contains("--dns-listen"), "{error}");
}
