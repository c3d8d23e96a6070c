//! The resolver against scripted servers on loopback, and the whole of DNS with real `dig` and `dnsmasq`.

use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use vnet_proto::model::{Reason, VerdictAction};

use super::*;
use crate::engine::bindings::Bindings;
use crate::engine::gateway::dns::stream::framed;
use crate::engine::gateway::dns::{Dns, Event, Transport, zones};

const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;

fn resolver(servers: &[SocketAddr]) -> Resolver {
    limited(Upstreams::Fixed(servers.to_vec()), Vec::new(), TOTAL_TIME)
}

fn limited(upstreams: Upstreams, never: Vec<IpAddr>, total_time: Duration) -> Resolver {
    Resolver::new(ResolverConfig {
        upstreams,
        never,
        in_flight_max: 4,
        total_time,
    })
}

/// As [`resolver`], for servers that say nothing.
fn impatient(servers: &[SocketAddr]) -> Resolver {
    limited(
        Upstreams::Fixed(servers.to_vec()),
        Vec::new(),
        Duration::from_millis(300),
    )
}

fn query(name: &str) -> Vec<u8> {
    let mut message = Message::new(0xabcd, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

/// The answer to a query, with one address.
fn answer(query: &[u8], last: u8) -> Message {
    let mut message = Message::from_vec(query).unwrap().into_response();
    let name = message.queries[0].name.clone();
    message.add_answer(Record::from_rdata(name, 60, RData::A(A::new(203, 0, 113, last))));
    message
}

fn addresses(bytes: &[u8]) -> Vec<String> {
    let message = Message::from_vec(bytes).unwrap();
    assert_eq!(message.metadata.id, 0xabcd, "the id of the query");
    message.answers.iter().map(|r| r.data.to_string()).collect()
}

/// A server that answers each datagram with what `script` makes of it and its number.
async fn serve(mut script: impl FnMut(usize, &[u8]) -> Vec<Vec<u8>> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        for count in 0.. {
            let Ok((length, from)) = socket.recv_from(&mut buffer).await else {
                break;
            };
            for datagram in script(count, &buffer[..length]) {
                socket.send_to(&datagram, from).await.unwrap();
            }
        }
    });
    address
}

#[tokio::test]
async fn only_the_identical_question_under_the_id_that_was_sent_is_answered() {
    let server = serve(|_, asked| {
        let good = answer(asked, 1);
        let mut other_id = good.clone();
        other_id.metadata.id = good.metadata.id.wrapping_add(1);
        let other_name = {
            let mut forged = answer(&query("b.test."), 66);
            forged.metadata.id = good.metadata.id;
            forged
        };
        let question = asked.to_vec();
        let mut all = vec![b"x".to_vec(), question];
        all.extend([other_id, other_name, good].iter().map(|m| m.to_vec().unwrap()));
        all
    })
    .await;
    let resolver = resolver(&[server]);
    assert_eq!(
        addresses(&resolver.resolve(query("a.test.")).await.unwrap()),
        ["203.0.113.1"]
    );
    assert_eq!(resolver.counts().mismatched.load(Relaxed), 4);
}

#[tokio::test]
async fn each_question_has_its_own_port_and_id() {
    let (seen, mut asked) = tokio::sync::mpsc::unbounded_channel();
    let socket = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
    let server = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let reply = answer(&buffer[..length], 1);
            let _ = seen.send((from.port(), reply.metadata.id));
            socket.send_to(&reply.to_vec().unwrap(), from).await.unwrap();
        }
    });
    let resolver = resolver(&[server]);
    let mut ports = std::collections::BTreeSet::new();
    let mut ids = std::collections::BTreeSet::new();
    for _ in 0..20 {
        resolver.resolve(query("a.test.")).await.unwrap();
        let (port, id) = asked.recv().await.unwrap();
        ports.insert(port);
        ids.insert(id);
    }
    assert!(ports.len() > 15 && ids.len() > 15, "{ports:?} {ids:?}");
}

#[tokio::test]
async fn the_next_server_is_asked_when_one_is_dead_or_broken() {
    let dead = UdpSocket::bind((LOOPBACK, 0))
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let broken = serve(|_, asked| {
        let mut fault = Message::from_vec(asked).unwrap().into_response();
        fault.metadata.response_code = ResponseCode::ServFail;
        vec![fault.to_vec().unwrap()]
    })
    .await;
    let good = serve(|_, asked| vec![answer(asked, 9).to_vec().unwrap()]).await;
    let answered = resolver(&[dead, broken, good])
        .resolve(query("a.test."))
        .await
        .unwrap();
    assert_eq!(addresses(&answered), ["203.0.113.9"]);
    let fault = resolver(&[dead, broken]).resolve(query("a.test.")).await.unwrap();
    assert_eq!(
        Message::from_vec(&fault).unwrap().metadata.response_code,
        ResponseCode::ServFail,
        "nobody knew better"
    );
}

#[tokio::test]
async fn silence_is_an_error_after_the_total_time() {
    let silent = serve(|_, _| Vec::new()).await;
    let started = Instant::now();
    let none = impatient(&[silent]).resolve(query("a.test.")).await;
    assert!(
        matches!(none, Err(ResolveError::NoAnswer { servers: 1, .. })),
        "{none:?}"
    );
    assert!(
        started.elapsed() >= Duration::from_millis(300),
        "a second and third round"
    );
}

#[tokio::test]
async fn a_server_from_before_edns_is_asked_again_without() {
    for bare in [false, true] {
        let server = serve(move |_, asked| {
            let mut reply = answer(asked, 1);
            if reply.edns.take().is_some() {
                reply.metadata.response_code = ResponseCode::FormErr;
                reply.answers.clear();
                if bare {
                    reply.queries.clear();
                }
            }
            vec![reply.to_vec().unwrap()]
        })
        .await;
        let mut asked = Message::from_vec(&query("a.test.")).unwrap();
        asked.set_edns(hickory_proto::op::Edns::new());
        let answered = resolver(&[server])
            .resolve(asked.to_vec().unwrap())
            .await
            .unwrap();
        assert_eq!(addresses(&answered), ["203.0.113.1"], "bare: {bare}");
    }
}

#[tokio::test]
async fn a_cut_answer_is_fetched_whole_over_tcp() {
    let tcp = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(address).await.unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
        let mut cut = Message::from_vec(&buffer[..length]).unwrap().into_response();
        cut.metadata.truncation = true;
        udp.send_to(&cut.to_vec().unwrap(), from).await.unwrap();
        let (mut stream, _) = tcp.accept().await.unwrap();
        let mut asked = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut asked).await.unwrap();
        stream
            .write_all(&framed(&answer(&asked, 3).to_vec().unwrap()).unwrap())
            .await
            .unwrap();
    });
    let resolver = resolver(&[address]);
    assert_eq!(
        addresses(&resolver.resolve(query("a.test.")).await.unwrap()),
        ["203.0.113.3"]
    );
    assert_eq!(resolver.counts().over_tcp.load(Relaxed), 1);
}

#[tokio::test]
async fn without_servers_there_is_an_error_and_the_gateway_is_never_asked() {
    assert!(matches!(
        resolver(&[]).resolve(query("a.test.")).await,
        Err(ResolveError::NoServers)
    ));
    let gateway = SocketAddr::from(([192, 168, 127, 1], 53));
    let resolver = limited(Upstreams::Fixed(vec![gateway]), vec![gateway.ip()], TOTAL_TIME);
    assert!(matches!(
        resolver.resolve(query("a.test.")).await,
        Err(ResolveError::NoServers)
    ));
    assert!(matches!(
        resolver.resolve(b"nonsense".to_vec()).await,
        Err(ResolveError::Malformed)
    ));
    resolver.set_servers(vec!["[::1]:53".parse().unwrap()]);
    assert_eq!(resolver.servers().len(), 1);
    let missing = Upstreams::Host("/nonexistent/resolv.conf".into());
    let resolver = limited(missing, Vec::new(), TOTAL_TIME);
    assert!(matches!(
        resolver.resolve(query("a.test.")).await,
        Err(ResolveError::NoServers)
    ));
}

/// A file of the host's that ends with the test.
struct HostFile(std::path::PathBuf);

impl HostFile {
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("vnet-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        Self(directory)
    }

    fn path(&self) -> std::path::PathBuf {
        self.0.join("resolv.conf")
    }

    fn replace(&self, text: &str) {
        std::fs::write(self.0.join("next"), text).unwrap();
        std::fs::rename(self.0.join("next"), self.path()).unwrap();
    }
}

impl Drop for HostFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[tokio::test]
async fn a_question_that_waits_for_a_dead_server_goes_on_with_those_of_the_hosts_new_network() {
    // No port can be said in the file: what stands in it is asked on port 53, where nobody is on these.
    let file = HostFile::new("moved");
    let missing = limited(Upstreams::Host(file.path()), Vec::new(), Duration::from_secs(6));
    assert!(matches!(
        missing.resolve(query("a.test.")).await,
        Err(ResolveError::NoServers)
    ));
    file.replace("nameserver 127.7.7.1\nnameserver 127.7.7.2\n");
    // The file is looked at once a second.
    let until = Instant::now() + TOTAL_TIME;
    while missing.servers().is_empty() {
        assert!(Instant::now() < until, "it is looked at again");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(
        missing.servers(),
        ["127.7.7.1:53".parse().unwrap(), "127.7.7.2:53".parse().unwrap()]
    );

    // A question under way when the servers are others.
    let (asked, mut is_asked) = tokio::sync::mpsc::unbounded_channel();
    let silent = serve(move |_, _| {
        asked.send(()).unwrap();
        Vec::new()
    })
    .await;
    let good = serve(|_, asked| vec![answer(asked, 5).to_vec().unwrap()]).await;
    let moving = limited(Upstreams::Fixed(vec![silent]), Vec::new(), Duration::from_secs(2));
    let asking = tokio::spawn({
        let moving = moving.clone();
        async move { moving.resolve(query("a.test.")).await }
    });
    is_asked.recv().await.unwrap();
    moving.set_servers(vec![good]);
    assert_eq!(addresses(&asking.await.unwrap().unwrap()), ["203.0.113.5"]);
}

#[tokio::test]
async fn two_dead_servers_before_a_good_one_are_passed_before_a_guest_gives_up() {
    let silent = serve(|_, _| Vec::new()).await;
    let silent_too = serve(|_, _| Vec::new()).await;
    let good = serve(|_, asked| vec![answer(asked, 6).to_vec().unwrap()]).await;
    let started = Instant::now();
    let answered = resolver(&[silent, silent_too, good])
        .resolve(query("a.test."))
        .await;
    assert_eq!(addresses(&answered.unwrap()), ["203.0.113.6"]);
    // The usual resolvers wait for 5 s.
    assert!(
        started.elapsed() < Duration::from_millis(4_500),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn questions_under_way_are_bounded() {
    let silent = serve(|_, _| Vec::new()).await;
    let resolver = impatient(&[silent]);
    let waiting: Vec<_> = (0..4)
        .map(|_| {
            let resolver = resolver.clone();
            tokio::spawn(async move { resolver.resolve(query("a.test.")).await })
        })
        .collect();
    tokio::task::yield_now().await;
    assert!(matches!(
        resolver.resolve(query("a.test.")).await,
        Err(ResolveError::Busy(4))
    ));
    assert_eq!(resolver.counts().busy.load(Relaxed), 1);
    for question in waiting {
        assert!(question.await.unwrap().is_err());
    }
    assert_eq!(resolver.counts().unanswered.load(Relaxed), 4);
}

#[tokio::test]
async fn a_guest_with_all_its_questions_under_way_keeps_none_of_anothers_from_being_asked() {
    let server = serve(|_, asked| {
        let is_slow = asked.windows(4).any(|bytes| bytes == b"slow");
        if is_slow {
            Vec::new()
        } else {
            vec![answer(asked, 1).to_vec().unwrap()]
        }
    })
    .await;
    let all = impatient(&[server]);
    let (hog, other) = (all.for_guest(), all.for_guest());
    let waiting: Vec<_> = (0..4)
        .map(|_| {
            let hog = hog.clone();
            tokio::spawn(async move { hog.resolve(query("slow.test.")).await })
        })
        .collect();
    tokio::task::yield_now().await;
    assert!(matches!(
        hog.resolve(query("a.test.")).await,
        Err(ResolveError::Busy(4))
    ));
    assert_eq!(
        addresses(&other.resolve(query("a.test.")).await.unwrap()),
        ["203.0.113.1"]
    );
    for question in waiting {
        assert!(question.await.unwrap().is_err());
    }
    // Counted together.
    assert_eq!(all.counts().busy.load(Relaxed), 1);
    assert_eq!(all.counts().questions.load(Relaxed), 5);
}

/// A `dnsmasq` on a free port of loopback, ended with the test.
struct Dnsmasq(Child, SocketAddr);

impl Dnsmasq {
    async fn start() -> Self {
        let port = TcpListener::bind((LOOPBACK, 0))
            .await
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let long: Vec<String> = (0..20)
            .map(|n| format!("--txt-record=long.test,{}", format!("{n:02}").repeat(60)))
            .collect();
        let child = Command::new("dnsmasq")
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--no-resolv",
                "--no-hosts",
                "--bind-interfaces",
            ])
            .args([
                "--listen-address=127.0.0.1",
                "--pid-file=",
                "--user=root",
                "--local=/test/",
                "--edns-packet-max=4096",
            ])
            .arg(format!("--port={port}"))
            .args([
                "--host-record=web.test,203.0.113.10,2001:db8::10,300",
                "--cname=alias.test,web.test,120",
            ])
            .args([
                "--dns-rr=odd.test,65280,01:02:03",
                "--mx-host=web.test,mail.test,5",
            ])
            .args(long)
            .stderr(Stdio::null())
            .spawn()
            .expect("dnsmasq is needed: install the package dnsmasq-base");
        // Held from here on, so that it ends with the test whatever happens.
        let dnsmasq = Self(child, SocketAddr::from((LOOPBACK, port)));
        for _ in 0..200 {
            if TcpStream::connect(dnsmasq.1).await.is_ok() {
                return dnsmasq;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("dnsmasq does not listen on {}", dnsmasq.1);
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The gateway's DNS on real sockets in place of a guest's link: `denied.test` and below is denied,
/// everything else allowed at once.
async fn gateway(resolver: Resolver) -> (SocketAddr, Arc<Mutex<Bindings>>) {
    let tcp = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = Arc::new(UdpSocket::bind(address).await.unwrap());
    let bindings = Arc::new(Mutex::new(Bindings::default()));
    let learned = Arc::clone(&bindings);
    tokio::spawn(async move {
        let zones = zones::default_zones([192, 168, 127, 1].into(), Some([192, 168, 127, 254].into()));
        let mut dns = Dns::new(Duration::from_secs(4), [7; 32]);
        let (answers, mut resolved) = tokio::sync::mpsc::unbounded_channel::<(u64, Option<Vec<u8>>)>();
        let (pieces, mut streams) = tokio::sync::mpsc::unbounded_channel::<(u64, Vec<u8>)>();
        let mut writers = std::collections::HashMap::new();
        let mut buffer = [0; 2048];
        let mut next = 0_u64;
        loop {
            tokio::select! {
                Ok((length, from)) = udp.recv_from(&mut buffer) => {
                    dns.handle_query(Duration::ZERO, &zones, from, Transport::Udp, &buffer[..length]);
                }
                Ok((stream, _)) = tcp.accept() => {
                    let (mut reader, writer) = stream.into_split();
                    next += 1;
                    writers.insert(next, writer);
                    let (pieces, connection) = (pieces.clone(), next);
                    tokio::spawn(async move {
                        let mut buffer = [0; 2048];
                        while let Ok(length @ 1..) = reader.read(&mut buffer).await {
                            let _ = pieces.send((connection, buffer[..length].to_vec()));
                        }
                    });
                }
                Some((connection, piece)) = streams.recv() => {
                    let client = SocketAddr::from((LOOPBACK, 1));
                    assert_eq!(dns.handle_stream(Duration::ZERO, &zones, client, connection, &piece), Some(piece.len()));
                }
                Some((query, answer)) = resolved.recv() => dns.handle_upstream(query, answer.as_deref()),
            }
            while let Some(event) = dns.poll_event() {
                match event {
                    Event::Reply {
                        client,
                        transport: Transport::Udp,
                        bytes,
                    } => {
                        udp.send_to(&bytes, client).await.unwrap();
                    }
                    Event::Reply {
                        transport: Transport::Redirected(_),
                        ..
                    } => panic!("nothing was asked of another server"),
                    Event::Reply {
                        transport: Transport::Tcp(connection),
                        bytes,
                        ..
                    } => {
                        writers
                            .get_mut(&connection)
                            .unwrap()
                            .write_all(&bytes)
                            .await
                            .unwrap();
                    }
                    Event::Ask { name, .. } => {
                        let denied = name.as_str().ends_with("denied.test");
                        let action = if denied {
                            VerdictAction::Deny
                        } else {
                            VerdictAction::Allow
                        };
                        let reason = Reason::new("rule", "rules[0]", "rules[0] denies denied.test");
                        dns.handle_name_verdict(Duration::ZERO, &name, action, &reason, 0);
                    }
                    Event::Upstream { query, bytes } => {
                        let (resolver, answers) = (resolver.clone(), answers.clone());
                        tokio::spawn(
                            async move { answers.send((query, resolver.resolve(bytes).await.ok())) },
                        );
                    }
                    Event::Bind {
                        name,
                        addresses,
                        expires_in,
                    } => {
                        learned
                            .lock()
                            .unwrap()
                            .learn(Duration::ZERO, &name, &addresses, expires_in);
                    }
                    Event::Unasked { .. } | Event::Abandoned { .. } | Event::Decided { .. } => {}
                }
            }
        }
    });
    (address, bindings)
}

async fn dig(server: SocketAddr, arguments: &str) -> String {
    let port = server.port().to_string();
    let output = tokio::process::Command::new("dig")
        .args(["@127.0.0.1", "-p", &port, "+tries=1", "+time=5", "-r"])
        .args(arguments.split_whitespace())
        .output()
        .await
        .expect("dig is needed: install the package bind9-dnsutils");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn dig_through_the_gateway_sees_what_dnsmasq_says() {
    let dnsmasq = Dnsmasq::start().await;
    let (server, bindings) = gateway(resolver(&[dnsmasq.1])).await;

    assert_eq!(
        dig(server, "+short alias.test A").await,
        "web.test.\n203.0.113.10\n"
    );
    assert_eq!(dig(server, "+short Web.Test AAAA").await, "2001:db8::10\n");
    let names = bindings
        .lock()
        .unwrap()
        .names_of(Duration::from_secs(1), "203.0.113.10".parse().unwrap());
    assert_eq!(
        names.iter().map(|n| n.as_str()).collect::<Vec<_>>(),
        ["alias.test"]
    );

    assert_eq!(dig(server, "+short web.test MX").await, "5 mail.test.\n");
    assert!(dig(server, "odd.test TYPE65280").await.contains("\\# 3 010203"));
    assert!(dig(server, "nobody.test").await.contains("status: NXDOMAIN"));
    assert_eq!(
        dig(server, "+short HOST.containers.internal").await,
        "192.168.127.254\n"
    );

    let denied = dig(server, "www.denied.test").await;
    assert!(
        denied.contains("status: REFUSED") && denied.contains("rules[0] denies denied.test"),
        "{denied}"
    );
    let plain = dig(server, "+noedns www.denied.test").await;
    assert!(
        plain.contains("status: REFUSED") && !plain.contains("OPT PSEUDOSECTION"),
        "{plain}"
    );

    // Too long for a datagram: cut, and whole over TCP, as dig does by itself.
    let cut = dig(server, "+ignore long.test TXT").await;
    assert!(cut.contains(" tc ") && cut.contains("ANSWER: 0"), "{cut}");
    let whole = dig(server, "long.test TXT").await;
    assert!(whole.contains("ANSWER: 20") && whole.contains("(TCP)"), "{whole}");
    assert!(dig(server, "+tcp +short web.test").await.contains("203.0.113.10"));
    assert!(
        dig(server, "+noedns +bufsize=0 web.test")
            .await
            .contains("203.0.113.10")
    );
    drop(dnsmasq);
}
