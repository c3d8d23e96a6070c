//! Every list: its table, and its JSON, to the byte.

use serde_json::json;
use vnet_proto::v1;

use super::scripted::Scripted;
use super::{domain, named, run, run_all, tcp, until_vm_stops};
use crate::output::Format;
use crate::output::testing::{ago, now};

/// What a list prints as a table, and as JSON.
async fn printed<M: prost::Message>(words: &[&str], method: &str, answer: M) -> (String, serde_json::Value) {
    let server = Scripted::start();
    server.answer(method, &answer);
    server.answer(method, &answer);
    server.answer(method, &answer);
    let table = run(&server, Format::Table, words).await.unwrap();
    let json = run(&server, Format::Json, words).await.unwrap();
    let yaml = run(&server, Format::Yaml, words).await.unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        serde_saphyr::from_str::<serde_json::Value>(&yaml).unwrap(),
        json,
        "YAML says the same"
    );
    (table, json)
}

fn request() -> v1::PendingRequest {
    v1::PendingRequest {
        id: "01ab".to_owned(),
        etag: "e1".to_owned(),
        vm: "web".to_owned(),
        target: tcp("10.99.0.1", 8080),
        names: vec!["a.example".to_owned(), "b.example".to_owned()],
        domain: "a.example".to_owned(),
        state: v1::PendingState::Open.into(),
        count: 3,
        held: 2,
        created_at: ago(65),
        held_until: ago(-12),
        guards: vec![v1::Guard::PrivateFromDns.into()],
        ..Default::default()
    }
}

#[tokio::test]
async fn pending_list() {
    let lookup = v1::PendingRequest {
        id: "01ac".to_owned(),
        vm: "db\u{1b}[2J".to_owned(),
        target: domain("example.com"),
        query_type: "A".to_owned(),
        count: 1,
        created_at: ago(5),
        ..Default::default()
    };
    // No guard of the address: the policy's.
    let resolver = v1::PendingRequest {
        id: "01ad".to_owned(),
        vm: "db".to_owned(),
        target: tcp("1.1.1.1", 443),
        count: 1,
        created_at: ago(5),
        reason: Some(v1::Reason {
            step: "guard".to_owned(),
            subject: "dns".to_owned(),
            text: "DNS over HTTPS".to_owned(),
        }),
        ..Default::default()
    };
    let answer = v1::ListPendingResponse {
        requests: vec![request(), lookup, resolver],
        ..Default::default()
    };

    let (table, json) = printed(&["pending", "list"], "PendingService/ListPending", answer).await;

    assert_eq!(
        table,
        "\
ID     VM            DOMAIN      ASKS                 NAMES                 COUNT   HELD   AGE   NOTE
01ab   web           a.example   tcp 10.99.0.1:8080   a.example,b.example   3       12s    1m    guarded: private-from-dns
01ac   db\\u{1b}[2J   -           domain example.com   -                     1       -      5s    -
01ad   db            -           tcp 1.1.1.1:443      -                     1       -      5s    guarded: dns
"
    );
    assert_eq!(
        json[0],
        json!({
            "id": "01ab",
            "etag": "e1",
            "vm": "web",
            "target": {"address": {"protocol": "PROTOCOL_TCP", "prefix": "10.99.0.1", "ports": {"first": 8080, "last": 8080}}},
            "names": ["a.example", "b.example"],
            "domain": "a.example",
            "guards": ["GUARD_PRIVATE_FROM_DNS"],
            "state": "PENDING_STATE_OPEN",
            "count": "3",
            "held": 2,
            "createdAt": "2026-01-02T03:03:00Z",
            "heldUntil": "2026-01-02T03:04:17Z",
        })
    );
    assert_eq!(
        json[1]["vm"], "db\u{1b}[2J",
        "escapes are of the terminal, not of the data"
    );
}

#[tokio::test]
async fn requests_of_one_domain_stand_together_where_the_oldest_of_them_does() {
    let asks = |id: &str, name: &str, registrable: &str| v1::PendingRequest {
        id: id.to_owned(),
        vm: "web".to_owned(),
        target: domain(name),
        domain: registrable.to_owned(),
        ..Default::default()
    };
    let answer = v1::ListPendingResponse {
        requests: vec![
            asks("r1", "localhost", ""),
            asks("r2", "a.example.com", "example.com"),
            asks("r3", "a.example.net", "example.net"),
            asks("r4", "gateway", ""),
            asks("r5", "b.example.com", "example.com"),
            asks("r6", "b.example.net", "example.net"),
        ],
        ..Default::default()
    };

    let (table, json) = printed(&["pending", "list"], "PendingService/ListPending", answer).await;

    let shown: Vec<&str> = table.lines().skip(1).map(|line| &line[..2]).collect();
    assert_eq!(shown, ["r1", "r2", "r5", "r3", "r6", "r4"]);
    let ids: Vec<&str> = (0..6).map(|n| json[n]["id"].as_str().unwrap()).collect();
    assert_eq!(
        ids,
        ["r1", "r2", "r3", "r4", "r5", "r6"],
        "programs get the oldest first"
    );
}

#[tokio::test]
async fn pending_show_says_what_each_answer_would_cover() {
    let reach = |name: &str, requests, past_flows| v1::ScopeReach {
        vms: Some(v1::VmSelector {
            name: name.to_owned(),
            all: name.is_empty(),
            ..Default::default()
        }),
        vm_count: 1,
        requests,
        names: 2,
        past_flows,
    };
    let option = v1::ScopeOption {
        scope: v1::Scope::HostPort.into(),
        target: tcp("10.99.0.1", 8080),
        reaches: vec![reach("web", 1, 0), reach("", 3, 12)],
    };
    let server = Scripted::start();
    let answer = v1::GetPendingResponse {
        request: Some(v1::PendingRequest {
            options: vec![option],
            ..request()
        }),
    };
    server.answer("PendingService/GetPending", &answer);

    let shown = run(&server, Format::Table, &["pending", "show", "01ab"])
        .await
        .unwrap();

    let lines: Vec<&str> = shown.lines().rev().take(3).map(str::trim).collect();
    assert_eq!(
        lines,
        [
            "for all VMs (1 VM): 3 requests, 2 known names, 12 past flows",
            "for web (1 VM): 1 request, 2 known names, 0 past flows",
            "Scope:       host-port: tcp 10.99.0.1:8080",
        ],
        "{shown}"
    );
}

#[tokio::test]
async fn an_empty_list_is_its_header_or_an_empty_array() {
    let (table, json) = printed(
        &["grants", "list"],
        "GrantService/ListGrants",
        v1::ListGrantsResponse::default(),
    )
    .await;

    assert_eq!(
        table,
        "ID   ACTION   TARGET   VMS   LIFETIME   ENDS IN   BUDGET   HITS   AGE   BY   REASON\n"
    );
    assert_eq!(json, json!([]));
}

#[tokio::test]
async fn grants_list() {
    let grants = vec![
        v1::Grant {
            id: "g1".to_owned(),
            action: v1::Action::Allow.into(),
            target: domain("*.example.com"),
            vms: Some(v1::VmSelector {
                all: true,
                ..Default::default()
            }),
            lifetime: Some(v1::Lifetime {
                kind: Some(v1::lifetime::Kind::Duration(prost_types::Duration {
                    seconds: 3600,
                    nanos: 0,
                })),
            }),
            created_at: ago(600),
            expires_at: ago(-3000),
            creator: "ada".to_owned(),
            reason: "upgrade".to_owned(),
            hits: 12,
            budget: Some(v1::Budget {
                connections: 5,
                ..Default::default()
            }),
            used: Some(v1::Budget {
                connections: 2,
                ..Default::default()
            }),
            ..Default::default()
        },
        v1::Grant {
            id: "g2".to_owned(),
            action: v1::Action::Deny.into(),
            target: tcp("10.0.0.0/8", 22),
            vms: named("web"),
            lifetime: until_vm_stops(),
            created_at: ago(1),
            ..Default::default()
        },
    ];

    let (table, json) = printed(
        &["grants", "list"],
        "GrantService/ListGrants",
        v1::ListGrantsResponse {
            grants,
            ..Default::default()
        },
    )
    .await;

    assert_eq!(
        table,
        "\
ID   ACTION   TARGET                 VMS       LIFETIME             ENDS IN   BUDGET            HITS   AGE   BY    REASON
g1   allow    domain *.example.com   all VMs   for 1h               50m       2/5 connections   12     10m   ada   upgrade
g2   deny     tcp 10.0.0.0/8:22      web       until the VM stops   -         -                 0      1s    -     -
"
    );
    assert_eq!(json[0]["lifetime"], json!({"duration": "3600s"}));
    assert_eq!(json[0]["hits"], "12");
}

#[tokio::test]
async fn vm_list() {
    let vms = vec![v1::Vm {
        name: "web".to_owned(),
        labels: [
            ("team".to_owned(), "net".to_owned()),
            ("env".to_owned(), "prod".to_owned()),
        ]
        .into(),
        state: v1::VmState::Attached.into(),
        mode: v1::Mode::Ask.into(),
        policy: "own".to_owned(),
        addresses: vec!["192.168.127.2".to_owned()],
        attached_at: ago(7200),
        live_flows: 4,
        pending_requests: 1,
        ..Default::default()
    }];

    let (table, json) = printed(
        &["vm", "list"],
        "VmService/ListVms",
        v1::ListVmsResponse {
            vms,
            ..Default::default()
        },
    )
    .await;

    assert_eq!(
        table,
        "\
NAME   STATE      MODE   POLICY   ADDRESSES       FLOWS   PENDING   AGE   LABELS
web    attached   ask    own      192.168.127.2   4       1         2h    env=prod,team=net
"
    );
    assert_eq!(json[0]["liveFlows"], "4");
}

#[tokio::test]
async fn flows_list() {
    let flows = vec![v1::Flow {
        id: "7.1".to_owned(),
        vm: "web".to_owned(),
        tuple: Some(v1::FlowTuple {
            protocol: v1::Protocol::Tcp.into(),
            guest_address: "192.168.127.2".to_owned(),
            guest_port: 40000,
            address: "2001:db8::1".to_owned(),
            port: 443,
        }),
        direction: v1::FlowDirection::Egress.into(),
        names: vec!["example.com".to_owned()],
        opened_at: ago(90),
        bytes_up: 999,
        bytes_down: 1_250_000,
        reason: Some(v1::Reason {
            step: "rule".to_owned(),
            subject: "rules[2]".to_owned(),
            text: String::new(),
        }),
        would_deny: true,
        ..Default::default()
    }];

    let (table, json) = printed(
        &["flows", "list"],
        "FlowService/ListFlows",
        v1::ListFlowsResponse {
            flows,
            ..Default::default()
        },
    )
    .await;

    assert_eq!(
        table,
        "\
ID    VM    DIRECTION   GUEST                 PEER                    NAMES         UP      DOWN     AGE   BY
7.1   web   egress      192.168.127.2:40000   tcp [2001:db8::1]:443   example.com   999 B   1.2 MB   1m    rules[2] (would deny)
"
    );
    assert_eq!(json[0]["bytesDown"], "1250000");
}

#[tokio::test]
async fn what_is_of_another_vm_names_it() {
    let flows = vec![v1::Flow {
        id: "7.2".to_owned(),
        vm: "web".to_owned(),
        tuple: Some(v1::FlowTuple {
            protocol: v1::Protocol::Tcp.into(),
            guest_address: "192.168.127.2".to_owned(),
            guest_port: 40000,
            address: "192.168.127.3".to_owned(),
            port: 22,
        }),
        peer_vm: "db\u{1b}[2J".to_owned(),
        ..Default::default()
    }];
    let answer = v1::ListFlowsResponse {
        flows,
        ..Default::default()
    };
    let (table, json) = printed(&["flows", "list"], "FlowService/ListFlows", answer).await;
    assert!(table.contains("tcp 192.168.127.3:22 (db\\u{1b}[2J)"), "{table}");
    assert_eq!(json[0]["peerVm"], "db\u{1b}[2J");

    let asked = v1::PendingRequest {
        peer_vm: "db".to_owned(),
        ..request()
    };
    let answer = v1::ListPendingResponse {
        requests: vec![asked],
        ..Default::default()
    };
    let (table, _) = printed(&["pending", "list"], "PendingService/ListPending", answer).await;
    assert!(table.contains("tcp 10.99.0.1:8080 (db)"), "{table}");
}

#[tokio::test]
async fn events_list_reads_no_more_than_was_asked_for() {
    let server = Scripted::start();
    let event = |sequence| v1::Event {
        sequence,
        time: Some(now().into()),
        kind: v1::EventKind::FlowDenied.into(),
        vm: "web".to_owned(),
        text: "denied tcp 10.0.0.1:22 by rules[0]".to_owned(),
        count: 2,
        ..Default::default()
    };
    let page = |sequences: std::ops::Range<u64>, next: &str| v1::ListEventsResponse {
        events: sequences.rev().map(event).collect(),
        next_page_token: next.to_owned(),
    };
    server.answer("EventService/ListEvents", &page(2..4, "more"));
    server.answer("EventService/ListEvents", &page(1..2, "yet more"));

    let words = [
        "events",
        "list",
        "--limit",
        "3",
        "--kind",
        "flow-denied",
        "--since",
        "1h",
        "--network",
        "net1",
    ];
    let table = run(&server, Format::Table, &words).await.unwrap();

    assert_eq!(
        table,
        "\
SEQUENCE   TIME                   KIND          VM    WHAT
3          2026-01-02T03:04:05Z   flow-denied   web   denied tcp 10.0.0.1:22 by rules[0] (2 times)
2          2026-01-02T03:04:05Z   flow-denied   web   denied tcp 10.0.0.1:22 by rules[0] (2 times)
1          2026-01-02T03:04:05Z   flow-denied   web   denied tcp 10.0.0.1:22 by rules[0] (2 times)
"
    );
    let asked: Vec<v1::ListEventsRequest> = server.asked("EventService/ListEvents");
    assert_eq!(asked.iter().map(|r| r.page_size).collect::<Vec<_>>(), [3, 1]);
    assert_eq!(asked[1].page_token, "more");
    assert!(asked.iter().all(|r| r.network == "net1"));
    assert_eq!(asked[0].kinds, [i32::from(v1::EventKind::FlowDenied)]);
    assert_eq!(asked[0].time.unwrap().start, ago(3600));
}

#[tokio::test]
async fn forward_list() {
    let forward = |listen: &str, keep_client_address| v1::Forward {
        network: "up-1".to_owned(),
        protocol: v1::Protocol::Tcp.into(),
        listen: listen.to_owned(),
        target: "192.168.127.2:80".to_owned(),
        keep_client_address,
        ..Default::default()
    };
    let forwards = vec![
        forward("127.0.0.1:8080", true),
        forward("unix:///run/web.sock", false),
    ];

    let (table, json) = printed(
        &["forward", "list"],
        "ForwardService/ListForwards",
        v1::ListForwardsResponse { forwards },
    )
    .await;

    assert_eq!(
        table,
        "\
NETWORK   PROTOCOL   LISTEN                 TARGET             CLIENT
up-1      tcp        127.0.0.1:8080         192.168.127.2:80   its own address
up-1      tcp        unix:///run/web.sock   192.168.127.2:80   the gateway
"
    );
    assert_eq!(
        json,
        json!([
            {"network": "up-1", "protocol": "PROTOCOL_TCP", "listen": "127.0.0.1:8080", "target": "192.168.127.2:80", "keepClientAddress": true},
            {"network": "up-1", "protocol": "PROTOCOL_TCP", "listen": "unix:///run/web.sock", "target": "192.168.127.2:80"},
        ])
    );
}

#[tokio::test]
async fn dns_lists() {
    let record = |name: &str| v1::ZoneRecord {
        name: name.to_owned(),
        address: "192.168.127.254".to_owned(),
        regexp: String::new(),
    };
    let zones = vec![v1::Zone {
        network: "up-1".to_owned(),
        name: "containers.internal".to_owned(),
        records: vec![record("host"), record("")],
        default_address: String::new(),
    }];
    let (table, _) = printed(
        &["dns", "zones"],
        "DnsService/ListZones",
        v1::ListZonesResponse { zones },
    )
    .await;
    assert_eq!(
        table,
        "\
NETWORK   ZONE                  RECORDS                                  DEFAULT
up-1      containers.internal   host=192.168.127.254,@=192.168.127.254   -
"
    );

    let bindings = vec![v1::Binding {
        vm: "web".to_owned(),
        name: "example.com".to_owned(),
        addresses: vec!["192.0.2.7".to_owned(), "2001:db8::7".to_owned()],
        expires_at: ago(-300),
    }];
    let answer = v1::ListBindingsResponse { bindings };
    let (table, _) = printed(&["dns", "bindings"], "DnsService/ListBindings", answer).await;
    assert_eq!(
        table,
        "\
VM    NAME          ADDRESSES               ENDS IN
web   example.com   192.0.2.7,2001:db8::7   5m
"
    );

    let denied = vec![v1::DeniedLookup {
        vm: "web".to_owned(),
        name: "bad.example".to_owned(),
        query_type: "AAAA".to_owned(),
        count: 9,
        last_at: ago(2),
        reason: Some(v1::Reason {
            step: "blockedDomains".to_owned(),
            subject: "*.example".to_owned(),
            text: "the name is blocked".to_owned(),
        }),
    }];
    let (table, json) = printed(
        &["dns", "denied"],
        "DnsService/ListDenied",
        v1::ListDeniedResponse { denied },
    )
    .await;
    assert_eq!(
        table,
        "\
VM    NAME          TYPE   COUNT   LAST   BECAUSE
web   bad.example   AAAA   9       2s     blockedDomains *.example: the name is blocked
"
    );
    assert_eq!(json[0]["queryType"], "AAAA");
}

#[tokio::test]
async fn policy_revisions() {
    let revisions = vec![v1::Policy {
        name: "default".to_owned(),
        revision: 2,
        source: "policy.yaml".to_owned(),
        applied_at: ago(60),
        applied_by: "ada".to_owned(),
        mode: v1::Mode::Enforce.into(),
        default_action: v1::Action::Deny.into(),
        ..Default::default()
    }];

    let answer = v1::ListRevisionsResponse {
        revisions,
        ..Default::default()
    };
    let (table, _) = printed(&["policy", "revisions"], "PolicyService/ListRevisions", answer).await;

    assert_eq!(
        table,
        "\
NAME      REVISION   APPLIED                BY    SOURCE        MODE      DEFAULT   NOTE
default   2          2026-01-02T03:03:05Z   ada   policy.yaml   enforce   deny      -
"
    );
}

#[tokio::test]
async fn every_page_of_a_list_is_read() {
    let server = Scripted::start();
    let page = |name: &str, next: &str| v1::ListVmsResponse {
        vms: vec![v1::Vm {
            name: name.to_owned(),
            ..Default::default()
        }],
        next_page_token: next.to_owned(),
    };
    server.answer("VmService/ListVms", &page("a", "t1"));
    server.answer("VmService/ListVms", &page("b", ""));

    let json = run(&server, Format::Json, &["vm", "list", "-l", "env=prod"])
        .await
        .unwrap();

    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json, json!([{"name": "a"}, {"name": "b"}]));
    let asked: Vec<v1::ListVmsRequest> = server.asked("VmService/ListVms");
    assert_eq!(asked[1].page_token, "t1");
    assert_eq!(asked[0].vms.as_ref().unwrap().labels["env"], "prod");
}

#[tokio::test]
async fn a_watch_prints_one_object_a_line() {
    let server = Scripted::start();
    let change = |change: v1::PendingChange, request| v1::WatchPendingResponse {
        change: change.into(),
        request,
    };
    let approved = v1::PendingRequest {
        state: v1::PendingState::Approved.into(),
        ..request()
    };
    for format in [Format::Json, Format::Yaml, Format::Table] {
        server.answer(
            "PendingService/WatchPending",
            &change(v1::PendingChange::Added, Some(request())),
        );
        server.answer(
            "PendingService/WatchPending",
            &change(v1::PendingChange::Synced, None),
        );
        server.answer(
            "PendingService/WatchPending",
            &change(v1::PendingChange::Removed, Some(approved.clone())),
        );
        let (text, end) = run_all(&server, format, &["pending", "watch"]).await;
        assert!(end.unwrap_err().to_string().contains("ended the watch"));
        if format == Format::Json {
            let lines: Vec<serde_json::Value> =
                text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
            assert_eq!(lines.len(), 3);
            assert_eq!(lines[0]["change"], "PENDING_CHANGE_ADDED");
            assert_eq!(lines[0]["request"]["id"], "01ab");
            assert_eq!(lines[2]["request"]["state"], "PENDING_STATE_APPROVED");
        } else if format == Format::Yaml {
            let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(&text).unwrap();
            assert_eq!(documents.len(), 3, "{text}");
            assert_eq!(documents[0]["request"]["id"], "01ab");
            assert_eq!(documents[2]["request"]["state"], "PENDING_STATE_APPROVED");
        } else {
            assert_eq!(
                text,
                "\
CHANGE      ID             VM                     ASKS                           NAMES
added       01ab           web                    tcp 10.99.0.1:8080             a.example,b.example
approved    01ab           web                    tcp 10.99.0.1:8080             a.example,b.example
"
            );
        }
    }
}
