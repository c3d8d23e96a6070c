//! The draft's paths: what is asked, answers, and events.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, BufReader};
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message;

use super::world::World;
use super::*;
use crate::cmd::tests::scripted::Scripted;

const SERVICES: Origin = Origin::Services;

fn json(answer: (u16, String)) -> serde_json::Value {
    assert_eq!(answer.0, 200, "{}", answer.1);
    serde_json::from_str(&answer.1).unwrap()
}

/// The list at a path, once it has so many entries.
async fn list(services: &Arc<Services>, path: &str, entries: usize) -> serde_json::Value {
    let within = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            let list = json(get(services, SERVICES, path).await);
            if list.as_array().is_some_and(|list| list.len() == entries) {
                return list;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    within
        .await
        .unwrap_or_else(|_| panic!("{path} never had {entries} entries"))
}

#[tokio::test]
async fn what_waits_is_listed_and_an_answer_lets_it_through() {
    let world = World::start().await;
    let mut one = world.dataplane("one", v1::Mode::Ask).await;
    let mut two = world.dataplane("two", v1::Mode::Ask).await;
    let services = world.services("one");
    one.miss_flow("192.0.2.1:443").await;
    two.miss_flow("192.0.2.2:443").await;

    for prefix in ["", "/services"] {
        let pending = list(&services, &format!("{prefix}/network/pending"), 1).await;
        let one = &pending[0];
        assert_eq!(
            (&one["protocol"], &one["ip"], &one["port"]),
            (&"tcp".into(), &"192.0.2.1".into(), &443.into())
        );
        assert_eq!((&one["count"], &one["status"]), (&1.into(), &"pending".into()));
        let keys: Vec<&str> = one.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            ["count", "ip", "last_seen", "port", "protocol", "status", "time"]
        );
        assert!(one["time"].as_str().unwrap().ends_with('Z'));
    }
    let allow = r#"{"protocol":"tcp","ip":"192.0.2.1","port":443}"#;
    assert_eq!(post(&services, SERVICES, "/network/allow", allow).await, done());

    let verdict = one.verdicts.recv().await.unwrap();
    assert_eq!(verdict.action(), v1::Action::Allow);
    assert_eq!(
        list(&services, "/network/pending", 0).await,
        serde_json::json!([])
    );
    let connections = list(&services, "/network/connections", 1).await;
    assert_eq!(connections[0]["status"], "approved");
    assert_eq!(
        json(get(&services, SERVICES, "/network/approved").await),
        serde_json::json!({"tcp:192.0.2.1:443": true})
    );
    assert!(
        two.verdicts.try_recv().is_err(),
        "the other network's is not answered"
    );
    assert_eq!(
        list(&world.services("two"), "/network/pending", 1).await[0]["ip"],
        "192.0.2.2"
    );

    let deny = r#"{"protocol":"tcp","ip":"192.0.2.3","port":80}"#;
    assert_eq!(
        post(&services, SERVICES, "/services/network/deny", deny).await,
        done()
    );
    one.miss_flow("192.0.2.3:80").await;
    assert_eq!(one.verdicts.recv().await.unwrap().action(), v1::Action::Deny);
    let connections = list(&services, "/network/connections", 2).await;
    let denied: Vec<_> = connections
        .as_array()
        .unwrap()
        .iter()
        .filter(|c| c["status"] == "denied")
        .collect();
    assert_eq!(denied.len(), 1);
    assert_eq!(denied[0]["ip"], "192.0.2.3");
}

#[tokio::test]
async fn names_that_wait_are_listed_and_allowed() {
    let world = World::start().await;
    let mut one = world.dataplane("one", v1::Mode::Ask).await;
    let services = world.services("one");
    one.miss_lookup("www.example.com").await;
    let pending = list(&services, "/dns/pending", 1).await;
    assert_eq!(pending[0]["domain"], "www.example.com");
    assert_eq!(pending[0]["count"], 1);
    assert!(pending[0]["first_seen"].as_str().unwrap().ends_with('Z'));

    assert_eq!(
        post(&services, SERVICES, "/dns/allow", r#"{"domain":"*.Example.com"}"#).await,
        done()
    );

    assert_eq!(one.verdicts.recv().await.unwrap().action(), v1::Action::Allow);
    assert_eq!(
        json(get(&services, SERVICES, "/services/dns/allowed").await),
        serde_json::json!(["*.example.com"])
    );
    assert_eq!(
        list(&services, "/services/dns/pending", 0).await,
        serde_json::json!([])
    );
    assert_eq!(
        json(get(&services, SERVICES, "/dns/denied").await),
        serde_json::json!([])
    );
}

#[tokio::test]
async fn answers_that_say_nothing_or_are_for_nobody_are_refused() {
    let world = World::start().await;
    let services = world.services("one");
    let allow = r#"{"protocol":"tcp","ip":"192.0.2.1","port":443}"#;
    let cases = [
        (
            "/network/allow",
            allow,
            409,
            "no VM is on network one, and so none to answer for",
        ),
        ("/network/allow", "", 400, "EOF"),
        (
            "/network/deny",
            r#"{"protocol":"tcp","ip":"192.0.2.1","port":"443"}"#,
            400,
            "json: cannot unmarshal string into Go struct field ConnectionRequest.port of type int",
        ),
        (
            "/network/deny",
            "{}",
            400,
            "protocol is \"\" (expected tcp, udp, icmp or icmpv6)",
        ),
        ("/dns/allow", "{}", 400, "domain is required"),
        ("/dns/allow", r#"{"domain":"exa mple.com"}"#, 400, ""),
    ];
    for (path, body, status, text) in cases {
        let answer = post(&services, SERVICES, path, body).await;
        assert_eq!(answer.0, status, "{path} {body}: {}", answer.1);
        assert!(answer.1.starts_with(text), "{path} {body}: {}", answer.1);
    }
    for path in ["/network/allow", "/network/deny", "/dns/allow"] {
        assert_eq!(get(&services, SERVICES, path).await, refused(400, "post only"));
    }
}

#[tokio::test]
async fn an_answer_that_a_rule_overrules_is_told_with_the_rule() {
    let server = Scripted::start();
    let vm = v1::Vm {
        name: "web".to_owned(),
        network: "one".to_owned(),
        ..Default::default()
    };
    let vms = v1::ListVmsResponse {
        vms: vec![vm],
        ..Default::default()
    };
    server.answer("VmService/ListVms", &vms);
    server.refuse(
        "GrantService/CreateGrant",
        tonic::Status::failed_precondition("rules[2] denies it, and no grant overrules a rule"),
    );
    let services = Services::new(super::world::config(server.connection(), "one"));
    let allow = r#"{"protocol":"udp","ip":"192.0.2.1","port":53}"#;

    let answer = post(&services, SERVICES, "/network/allow", allow).await;

    assert_eq!(
        answer,
        refused(409, "rules[2] denies it, and no grant overrules a rule")
    );
    let asked: Vec<v1::CreateGrantRequest> = server.asked("GrantService/CreateGrant");
    assert_eq!(asked[0].vms.as_ref().unwrap().name, "web");
    assert_eq!(
        asked[0].lifetime.as_ref().unwrap().kind,
        Some(v1::lifetime::Kind::UntilVmStops(true))
    );
}

/// One event of a stream.
#[derive(Debug, Default, PartialEq)]
struct Event {
    id: String,
    name: String,
    data: String,
}

/// The controlplane's number in its id.
fn number(event: &Event) -> u64 {
    let (_, number) = event.id.rsplit_once(':').unwrap();
    number.parse().unwrap()
}

/// A stream of events, as a browser reads it.
struct Reader(BufReader<DuplexStream>);

impl Reader {
    async fn open(services: &Arc<Services>, last: &str) -> Self {
        let mut stream = connect(services, SERVICES);
        let last = if last.is_empty() {
            String::new()
        } else {
            format!("Last-Event-ID: {last}\r\n")
        };
        let request = format!("GET /network/events HTTP/1.1\r\nHost: x\r\n{last}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reader = Self(BufReader::new(stream));
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(reader.0.read_line(&mut head).await.unwrap(), 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("Content-Type: text/event-stream\r\n"), "{head}");
        assert!(head.contains("Cache-Control: no-cache\r\n"), "{head}");
        assert!(!head.contains("Access-Control"), "{head}");
        reader
    }

    async fn next(&mut self) -> Event {
        let next = async {
            let mut event = Event::default();
            loop {
                let mut line = String::new();
                assert_ne!(self.0.read_line(&mut line).await.unwrap(), 0, "it ended");
                match line.trim_end().split_once(": ") {
                    Some(("id", id)) => event.id = id.to_owned(),
                    Some(("event", name)) => event.name = name.to_owned(),
                    Some(("data", data)) => event.data = data.to_owned(),
                    // Sizes of chunks, and comments.
                    Some(_) => {}
                    None if line.trim().is_empty() && !event.name.is_empty() => return event,
                    None => {}
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), next)
            .await
            .expect("no event")
    }

    async fn until(&mut self, name: &str) -> Event {
        loop {
            let event = self.next().await;
            if event.name == name {
                return event;
            }
        }
    }
}

#[tokio::test]
async fn events_begin_with_what_is_known_go_on_as_it_happens_and_resume_where_a_reader_was() {
    let world = World::start().await;
    let mut one = world.dataplane("one", v1::Mode::Ask).await;
    let mut two = world.dataplane("two", v1::Mode::Ask).await;
    let services = world.services("one");
    one.miss_flow("192.0.2.1:443").await;
    list(&services, "/network/pending", 1).await;

    let mut reader = Reader::open(&services, "").await;
    let init = reader.next().await;
    assert_eq!(init.name, "init");
    let known: serde_json::Value = serde_json::from_str(&init.data).unwrap();
    assert_eq!(
        (&known[0]["ip"], &known[0]["status"]),
        (&"192.0.2.1".into(), &"pending".into())
    );

    two.miss_flow("192.0.2.99:1").await;
    one.miss_flow("192.0.2.2:80").await;
    let pending = reader.next().await;
    assert_eq!(pending.name, "network_pending", "{}", pending.data);
    assert!(number(&pending) > number(&init));
    let data: serde_json::Value = serde_json::from_str(&pending.data).unwrap();
    assert_eq!(
        (&data["protocol"], &data["ip"], &data["port"]),
        (&"tcp".into(), &"192.0.2.2".into(), &80.into())
    );
    assert_eq!((&data["count"], &data["status"]), (&1.into(), &"pending".into()));

    // Gone, and back later.
    drop(reader);
    let allow = r#"{"protocol":"tcp","ip":"192.0.2.2","port":80}"#;
    assert_eq!(post(&services, SERVICES, "/network/allow", allow).await, done());
    let deny = r#"{"protocol":"tcp","ip":"192.0.2.1","port":443}"#;
    assert_eq!(post(&services, SERVICES, "/network/deny", deny).await, done());
    one.miss_lookup("www.example.com").await;
    list(&services, "/dns/pending", 1).await;
    assert_eq!(
        post(
            &services,
            SERVICES,
            "/dns/allow",
            r#"{"domain":"www.example.com"}"#
        )
        .await,
        done()
    );

    let mut reader = Reader::open(&services, &pending.id).await;
    let mut last = number(&pending);
    let mut names = Vec::new();
    loop {
        let event = reader.next().await;
        assert!(
            !event.data.contains("192.0.2.99"),
            "of another network: {}",
            event.data
        );
        let id = number(&event);
        assert!(id > last, "{event:?}");
        last = id;
        names.push(event.name.clone());
        if event.name == "dns_allowed" {
            assert_eq!(event.data, r#"{"domain":"www.example.com"}"#);
            break;
        }
    }
    for expected in ["network_approved", "network_denied", "dns_pending"] {
        assert!(names.iter().any(|name| name == expected), "{expected}: {names:?}");
    }
    assert!(!names.iter().any(|name| name == "init"), "{names:?}");
}

#[tokio::test]
async fn a_vm_that_came_and_went_is_told_to_its_own_network_alone() {
    let world = World::start().await;
    let mut first = world.dataplane_of("one", "web", v1::Mode::Ask).await;
    let (one, two) = (world.services("one"), world.services("two"));
    first.miss_flow("192.0.2.1:443").await;
    list(&one, "/network/pending", 1).await;
    // Denied, which is listed when it is gone, too.
    let deny = r#"{"protocol":"tcp","ip":"192.0.2.3","port":80}"#;
    assert_eq!(post(&one, SERVICES, "/network/deny", deny).await, done());
    first.miss_flow("192.0.2.3:80").await;
    assert_eq!(first.verdicts.recv().await.unwrap().action(), v1::Action::Deny);
    first
        .say(Message::VmDown(v1::VmDown {
            vm: 1,
            ..Default::default()
        }))
        .await;
    list(&one, "/network/pending", 0).await;
    // Another network's VM has its name now.
    let mut second = world.dataplane_of("two", "web", v1::Mode::Ask).await;
    second.miss_flow("192.0.2.2:443").await;
    list(&two, "/network/pending", 1).await;

    // What happened before either looked.
    let told = async |services: &Arc<Services>, network: &str, last: &str| {
        let mut reader = Reader::open(services, &format!("{network}:1")).await;
        let mut told = Vec::new();
        loop {
            let event = reader.next().await;
            let data: serde_json::Value = serde_json::from_str(&event.data).unwrap();
            told.push(format!("{} {}", event.name, data["ip"].as_str().unwrap()));
            if told.last().is_some_and(|told| told == last) {
                return told;
            }
        }
    };
    assert_eq!(
        told(&one, "one", "network_denied 192.0.2.1").await,
        [
            "network_pending 192.0.2.1",
            "network_denied 192.0.2.3",
            "network_denied 192.0.2.3",
            "network_denied 192.0.2.1",
        ]
    );
    assert_eq!(
        told(&two, "two", "network_pending 192.0.2.2").await,
        ["network_pending 192.0.2.2"]
    );
    let known = json(get(&one, SERVICES, "/network/connections").await);
    assert_eq!(known.as_array().unwrap().len(), 1, "{known}");
    assert_eq!(
        (&known[0]["ip"], &known[0]["status"]),
        (&"192.0.2.3".into(), &"denied".into())
    );
    let known = json(get(&two, SERVICES, "/network/connections").await);
    assert_eq!(known.as_array().unwrap().len(), 1, "{known}");
    assert_eq!(known[0]["ip"], "192.0.2.2");
}

#[tokio::test]
async fn who_was_elsewhere_is_told_of_a_gap_and_begins_anew() {
    let world = World::start().await;
    let _one = world.dataplane("one", v1::Mode::Ask).await;
    let services = world.services("one");
    for last in ["one:999999999999", "one:99999999999999999999", "0", "yesterday"] {
        let mut reader = Reader::open(&services, last).await;
        let gap = reader.next().await;
        assert_eq!(
            (gap.name.as_str(), gap.data.as_str(), gap.id.as_str()),
            ("gap", "{\"missed\":0}", ""),
            "{last}"
        );
        assert_eq!(reader.until("init").await.data, "[]", "{last}");
    }
}

/// Its network has another name then, and the end of what waited is not told as this one's.
#[tokio::test]
async fn who_comes_back_after_a_restart_of_gvproxy_begins_anew_and_keeps_no_question_of_before() {
    let world = World::start().await;
    let mut before = world.dataplane_of("gvproxy-1", "web", v1::Mode::Ask).await;
    let services = world.services("gvproxy-1");
    before.miss_flow("192.0.2.1:443").await;
    list(&services, "/network/pending", 1).await;
    let init = Reader::open(&services, "").await.next().await;
    assert!(init.data.contains("192.0.2.1"), "{init:?}");
    before
        .say(Message::VmDown(v1::VmDown {
            vm: 1,
            ..Default::default()
        }))
        .await;
    list(&services, "/network/pending", 0).await;
    let mut after = world.dataplane_of("gvproxy-2", "web", v1::Mode::Ask).await;
    let services = world.services("gvproxy-2");

    let mut reader = Reader::open(&services, &init.id).await;

    assert_eq!(reader.next().await.name, "gap");
    let anew = reader.next().await;
    assert_eq!((anew.name.as_str(), anew.data.as_str()), ("init", "[]"));
    after.miss_flow("192.0.2.2:443").await;
    let pending = reader.next().await;
    assert_eq!(pending.name, "network_pending");
    assert!(number(&pending) >= number(&anew), "{pending:?}");
}

#[tokio::test]
async fn what_a_reader_was_too_slow_for_and_what_nobody_recorded_is_a_gap() {
    let server = Scripted::start();
    let event = |kind: v1::EventKind, sequence| v1::WatchEventsResponse {
        event: Some(v1::Event {
            kind: kind.into(),
            sequence,
            missed: if kind == v1::EventKind::Gap { 7 } else { 0 },
            ..Default::default()
        }),
    };
    server.answer("EventService/WatchEvents", &event(v1::EventKind::Gap, 0));
    server.answer(
        "EventService/WatchEvents",
        &event(v1::EventKind::HistoryCutOff, 12),
    );
    let services = Services::new(super::world::config(server.connection(), "one"));

    let mut reader = Reader::open(&services, "one:4").await;

    assert_eq!(reader.next().await.data, "{\"missed\":7}");
    assert_eq!(reader.next().await.data, "{\"missed\":0}");
    // That stream has ended; it goes on where it was.
    let asked = loop {
        let asked: Vec<v1::WatchEventsRequest> = server.asked("EventService/WatchEvents");
        if asked.len() > 1 {
            break asked;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(
        (asked[0].after_sequence, asked[1].after_sequence),
        (Some(4), Some(12))
    );
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused_until_another_ends() {
    let world = World::start().await;
    let _one = world.dataplane("one", v1::Mode::Ask).await;
    let services = world.services("one");
    let mut readers = Vec::new();
    for _ in 0..EVENT_STREAMS_MAX {
        readers.push(Reader::open(&services, "").await);
    }
    let (status, text) = get(&services, SERVICES, "/network/events").await;
    assert_eq!(
        (status, text.as_str()),
        (503, "32 streams of events are open already\n")
    );
    readers.pop();
    while services.event_streams.available_permits() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Reader::open(&services, "").await;
}
