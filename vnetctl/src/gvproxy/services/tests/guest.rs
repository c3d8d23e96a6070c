//! What a guest may ask for, and what is served on a socket that a VM can reach.

use std::sync::atomic::{AtomicBool, Ordering};

use vnet_proto::v1;

use super::world::{World, as_set, config, nowhere};
use super::*;

const ALL: &str = "/services/forwarder/all";
const EXPOSE: &str = "/services/forwarder/expose";
const UNEXPOSE: &str = "/services/forwarder/unexpose";

const GUEST: Origin = guest(2);

const fn guest(last: u8) -> Origin {
    Origin::Guest(Guest {
        vm: vnet_proto::model::VmId(1),
        address: std::net::IpAddr::V4(Ipv4Addr::new(192, 168, 127, last)),
    })
}

/// Every path, and whether it is posted.
const PATHS: [(&str, bool); 32] = [
    (ALL, false),
    (EXPOSE, true),
    (UNEXPOSE, true),
    ("/services/dns/all", false),
    ("/services/dns/add", true),
    ("/services/dns/remove", true),
    ("/services/dns/remove/record", true),
    ("/services/dhcp/leases", false),
    ("/leases", false),
    ("/cam", false),
    ("/stats", false),
    ("/tunnel?ip=192.168.127.2&port=22", true),
    ("/network/pending", false),
    ("/network/approved", false),
    ("/network/connections", false),
    ("/network/allow", true),
    ("/network/deny", true),
    ("/network/events", false),
    ("/dns/pending", false),
    ("/dns/denied", false),
    ("/dns/allowed", false),
    ("/dns/allow", true),
    ("/services/network/pending", false),
    ("/services/network/approved", false),
    ("/services/network/connections", false),
    ("/services/network/allow", true),
    ("/services/network/deny", true),
    ("/services/network/events", false),
    ("/services/dns/pending", false),
    ("/services/dns/denied", false),
    ("/services/dns/allowed", false),
    ("/services/dns/allow", true),
];

fn is_approval(path: &str) -> bool {
    let path = path.strip_prefix("/services").unwrap_or(path);
    path.starts_with("/network/")
        || matches!(
            path,
            "/dns/pending" | "/dns/denied" | "/dns/allowed" | "/dns/allow"
        )
}

fn api() -> Option<GuestApi> {
    Some(GuestApi::default())
}

fn open(connection: Connection) -> Arc<Services> {
    Services::new(ServicesConfig {
        guests: api(),
        ..config(connection, "one")
    })
}

#[tokio::test]
async fn a_guest_that_posts_each_path_reaches_its_own_three_and_nothing_else() {
    let services = open(nowhere());
    for (path, _) in PATHS {
        for method in ["POST", "GET", "PUT", "DELETE"] {
            let (status, body) = ask(&services, GUEST, method, path, "{}").await;
            if path.starts_with("/services/forwarder/") {
                assert_ne!(status, 404, "{method} {path}");
                assert_ne!(status, 403, "{method} {path}");
            } else {
                assert_eq!(
                    (status, body.as_str()),
                    (404, "404 page not found\n"),
                    "{method} {path}"
                );
            }
        }
    }
    for path in [
        "/",
        "/connect",
        "/services",
        "/services/forwarder",
        "//services/forwarder/all",
        "/debug/pprof/",
    ] {
        assert_eq!(get(&services, GUEST, path).await.0, 404, "{path}");
    }
}

#[tokio::test]
async fn a_socket_that_a_vm_can_reach_has_no_approvals_and_under_a_policy_neither_forwards_nor_zones() {
    let is_in_force = Arc::new(AtomicBool::new(false));
    let services = Services::new(ServicesConfig {
        policy_in_force: as_set(&is_in_force),
        ..config(nowhere(), "one")
    });
    let no_approval = "not on a socket that a VM can reach: use the one of -services\n";
    let no_policy =
        "a policy or mode is in force, so not on a socket that a VM can reach: use the one of -services\n";
    for in_force in [false, true] {
        is_in_force.store(in_force, Ordering::SeqCst);
        for (path, is_post) in PATHS {
            if path.starts_with("/tunnel") {
                continue;
            }
            let method = if is_post { "POST" } else { "GET" };
            let answer = ask(&services, Origin::Listen, method, path, "{}").await;
            let is_forward_or_zone =
                path.starts_with("/services/forwarder/") || path.starts_with("/services/dns/");
            if is_approval(path) {
                assert_eq!(answer, (403, no_approval.to_owned()), "{path}");
            } else if in_force && is_forward_or_zone {
                assert_eq!(answer, (403, no_policy.to_owned()), "{path}");
            } else {
                assert!(!matches!(answer.0, 403 | 404), "{path}: {answer:?}");
            }
            let (status, _) = ask(&services, Origin::Services, method, path, "{}").await;
            assert!(!matches!(status, 403 | 404), "{path} on the services socket");
        }
    }
}

#[tokio::test]
async fn where_it_cannot_be_known_whether_a_policy_is_in_force_nothing_is_served() {
    let services = Services::new(ServicesConfig {
        policy_in_force: policy_in_force(nowhere(), "one".to_owned(), false),
        guests: api(),
        ..config(nowhere(), "one")
    });
    let wanted = r#"{"local":"127.0.0.1:8080","remote":"192.168.127.2:80"}"#;
    for origin in [Origin::Listen, GUEST] {
        let (status, body) = post(&services, origin, EXPOSE, wanted).await;
        assert_eq!(status, 503, "{body}");
        assert_eq!(body, "no controlplane answers at unix:///nonexistent/vnet.sock\n");
    }
}

#[tokio::test]
async fn a_guest_exposes_its_own_address_and_sees_and_ends_its_own_forwards_alone() {
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Unspecified).await;
    let services = Services::new(ServicesConfig {
        guests: api(),
        ..world.config("one")
    });
    let host = r#"{"local":"127.0.0.1:1","remote":"192.168.127.2:1"}"#;
    assert_eq!(post(&services, Origin::Services, EXPOSE, host).await, done());
    for body in [
        r#"{"local":":8080","remote":":80"}"#,
        r#"{"local":"0.0.0.0:53","remote":"192.168.127.2:53","protocol":"udp"}"#,
    ] {
        assert_eq!(post(&services, GUEST, EXPOSE, body).await, done(), "{body}");
    }
    let own = "[{\"local\":\"0.0.0.0:53\",\"remote\":\"192.168.127.2:53\",\"protocol\":\"udp\"},\
               {\"local\":\":8080\",\"remote\":\"192.168.127.2:80\",\"protocol\":\"tcp\"}]\n";
    assert_eq!(get(&services, GUEST, ALL).await, (200, own.to_owned()));
    assert_eq!(get(&services, guest(3), ALL).await, (200, "[]\n".to_owned()));

    for (origin, local) in [(GUEST, "127.0.0.1:1"), (guest(3), ":8080")] {
        let body = format!(r#"{{"local":"{local}"}}"#);
        assert_eq!(
            post(&services, origin, UNEXPOSE, &body).await,
            refused(500, "proxy not found")
        );
    }
    let body = r#"{"local":":8080","remote":":80"}"#;
    assert_eq!(
        post(&services, guest(3), EXPOSE, body).await,
        refused(500, "proxy already running for tcp on :8080")
    );
    // The VM is not known by the address that this one speaks from.
    assert_eq!(
        post(&services, guest(3), EXPOSE, r#"{"local":":8081","remote":":80"}"#).await,
        refused(
            403,
            "192.168.127.3 is not an address of VM one, and a VM opens ports to itself alone"
        )
    );
    assert_eq!(
        post(&services, GUEST, UNEXPOSE, r#"{"local":":8080"}"#).await,
        done()
    );
    let left = get(&services, Origin::Services, ALL).await.1;
    assert!(
        left.contains("127.0.0.1:1\"") && !left.contains(":8080"),
        "{left}"
    );
}

#[tokio::test]
async fn who_has_a_port_is_told_on_the_services_socket_alone() {
    let world = World::start().await;
    let dataplane = world.dataplane("one", v1::Mode::Unspecified).await;
    dataplane.is_busy("127.0.0.1:9191");
    let services = of(&world, "one");
    let body = r#"{"local":"127.0.0.1:9191","remote":"192.168.127.2:80"}"#;
    let request = format!(
        "POST {EXPOSE} HTTP/1.1\r\nHost: gateway\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    for (origin, remedy) in [
        (GUEST, "expose another port"),
        (Origin::Listen, "expose another port"),
        (
            Origin::Services,
            "tcp 127.0.0.1:9191 is taken by nginx (pid 1234)",
        ),
    ] {
        let answer = raw(&services, origin, &request).await;
        assert!(
            answer.ends_with("listen tcp 127.0.0.1:9191: bind: address already in use\n"),
            "{answer}"
        );
        assert!(
            answer.contains(&format!("X-Vnet-Remedy: {remedy}\r\n")),
            "{answer}"
        );
        assert_eq!(answer.contains("nginx"), origin == Origin::Services, "{answer}");
    }
}

#[tokio::test]
async fn what_a_guest_may_not_expose_is_refused_and_touches_no_file() {
    let file = std::env::temp_dir().join(format!("vnet-gv-guest-{}", std::process::id()));
    std::fs::write(&file, "precious").unwrap();
    let services = open(nowhere());
    let only_ports = "a guest can expose tcp and udp, and nothing else";
    let only_own = "a guest can expose its own address alone, which is 192.168.127.2";
    let path = file.display().to_string();
    let cases = [
        (path.as_str(), "tcp://192.168.127.2:80", "unix", 403, only_ports),
        (
            path.as_str(),
            "ssh-tunnel://a@192.168.127.2/s?key=/k",
            "unix",
            403,
            only_ports,
        ),
        ("x", "tcp://192.168.127.2:80", "npipe", 403, only_ports),
        (":80", "192.168.127.3:80", "tcp", 403, only_own),
        (":80", "127.0.0.1:80", "udp", 403, only_own),
        (":80", "192.168.127.1:80", "tcp", 403, only_own),
        (":80", ":80", "sctp", 500, "unknown protocol sctp"),
        (
            "example.com:80",
            ":80",
            "tcp",
            500,
            "listen tcp: lookup example.com: no such host",
        ),
        (":80", "web:80", "tcp", 400, "\"web\" is not an IPv4 address"),
    ];
    for (local, remote, protocol, status, text) in cases {
        let body = serde_json::json!({"local": local, "remote": remote, "protocol": protocol}).to_string();
        assert_eq!(
            post(&services, GUEST, EXPOSE, &body).await,
            refused(status, text),
            "{body}"
        );
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    std::fs::remove_file(&file).unwrap();
}

#[tokio::test]
async fn guests_are_not_served_unless_they_are_to_be() {
    let services = Services::new(config(nowhere(), "one"));
    for path in [ALL, EXPOSE, UNEXPOSE] {
        assert_eq!(
            post(&services, GUEST, path, "{}").await,
            refused(403, "guests expose nothing here"),
            "{path}"
        );
    }
}

#[tokio::test]
async fn a_mode_of_the_networks_vm_is_a_policy_in_force_and_another_networks_is_none() {
    let world = World::start().await;
    let _strict = world.dataplane("strict", v1::Mode::Ask).await;
    let _free = world.dataplane("free", v1::Mode::Unspecified).await;
    for (network, status) in [("strict", 403), ("free", 200)] {
        let services = Services::new(ServicesConfig {
            guests: api(),
            ..world.config(network)
        });
        assert_eq!(get(&services, Origin::Listen, ALL).await.0, status, "{network}");
        assert_eq!(get(&services, GUEST, ALL).await.0, 200, "{network}: its own");
        assert_eq!(get(&services, Origin::Services, ALL).await.0, 200, "{network}");
    }
    let given = policy_in_force(world.connection(), "not there yet".to_owned(), true);
    assert!(given().await.unwrap());
}

#[tokio::test]
async fn while_no_vm_is_there_any_policy_is_one_in_force_and_nothing_is_opened_before_the_first_comes() {
    let world = World::start().await;
    let services = world.services("one");
    let is_in_force = policy_in_force(world.connection(), "one".to_owned(), false);
    assert!(!is_in_force().await.unwrap(), "nothing is");
    let client = world.connection().open().await.unwrap();
    let applied = v1::ApplyPolicyRequest {
        name: "others".to_owned(),
        document: "version: 1\nappliesTo: {name: other}\ndefaultAction: deny\n".to_owned(),
        ..Default::default()
    };
    client.policy().apply_policy(applied).await.unwrap();

    let add = r#"{"name":"github.com.","defaultIP":"192.0.2.1"}"#;
    let expose = r#"{"local":"127.0.0.1:0","remote":"192.168.127.3:80"}"#;
    for (path, body) in [("/services/dns/add", add), ("/services/forwarder/expose", expose)] {
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = raw(&services, Origin::Listen, &request).await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{path}: {answer}");
    }
    assert!(is_in_force().await.unwrap());
    // What it is under is known once it is there.
    let _free = world.dataplane("one", v1::Mode::Unspecified).await;
    assert_eq!(get(&services, Origin::Listen, ALL).await.0, 200);
}

#[tokio::test]
async fn a_guest_without_the_token_is_told_what_is_needed() {
    let path = std::env::temp_dir().join(format!("vnet-gv-token-{}", std::process::id()));
    std::fs::write(&path, "0123456789abcdef0123456789abcdef\n").unwrap();
    let services = Services::new(ServicesConfig {
        guests: Some(GuestApi {
            token: Some(Token::read(&path).unwrap()),
        }),
        ..config(nowhere(), "one")
    });
    std::fs::remove_file(&path).unwrap();
    let with = |value: &str| format!("GET {EXPOSE} HTTP/1.1\r\nHost: gateway\r\n{value}\r\n");

    let without = raw(&services, GUEST, &with("")).await;
    let wrong = raw(
        &services,
        GUEST,
        &with("Authorization: Bearer 0123456789abcdef0123456789abcdee\r\n"),
    )
    .await;
    let right = raw(
        &services,
        GUEST,
        &with("Authorization: Bearer 0123456789abcdef0123456789abcdef\r\n"),
    )
    .await;

    for answer in [without, wrong] {
        assert!(answer.starts_with("HTTP/1.1 401 Unauthorized\r\n"), "{answer}");
        assert!(answer.contains("Www-Authenticate: Bearer\r\n"), "{answer}");
        assert!(
            answer.ends_with("a token is needed: Authorization: Bearer TOKEN\n"),
            "{answer}"
        );
    }
    assert!(right.ends_with("post only\n"), "{right}");
}

fn of(world: &World, network: &str) -> Arc<Services> {
    Services::new(ServicesConfig {
        guests: api(),
        ..world.config(network)
    })
}

const WANTED: &str = r#"{"local":"127.0.0.1:8080","remote":":80"}"#;

/// The one open request, once it is there.
async fn the_request(world: &World) -> v1::PendingRequest {
    let client = world.connection().open().await.unwrap();
    for _ in 0..500 {
        let request = crate::client::unary(v1::ListPendingRequest::default());
        let open = client
            .pending()
            .list_pending(request)
            .await
            .unwrap()
            .into_inner()
            .requests;
        if let [one] = &open[..] {
            return one.clone();
        }
        assert!(open.is_empty(), "{open:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("nobody asked")
}

#[tokio::test]
async fn what_a_guest_exposes_in_mode_ask_waits_for_a_person_and_then_is_open() {
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Ask).await;
    let services = of(&world, "one");
    let waiting = {
        let services = Arc::clone(&services);
        tokio::spawn(async move { post(&services, GUEST, EXPOSE, WANTED).await })
    };

    let request = the_request(&world).await;
    assert_eq!(
        crate::output::words::target(request.target.as_ref()),
        "to open tcp 127.0.0.1:8080 to its port 80"
    );
    assert_eq!(get(&services, GUEST, ALL).await.1, "[]\n", "not yet");
    let client = world.connection().open().await.unwrap();
    let approve = v1::ApproveRequest {
        id: request.id,
        ..Default::default()
    };
    let approve = crate::client::unary(approve);
    let grant = client
        .pending()
        .approve(approve)
        .await
        .unwrap()
        .into_inner()
        .grant
        .unwrap();

    assert_eq!(waiting.await.unwrap(), done());
    let all = get(&services, GUEST, ALL).await.1;
    assert_eq!(
        all,
        "[{\"local\":\"127.0.0.1:8080\",\"remote\":\"192.168.127.2:80\",\"protocol\":\"tcp\"}]\n"
    );
    let revoke = crate::client::unary(v1::RevokeGrantRequest { id: grant.id });
    client.grants().revoke_grant(revoke).await.unwrap();
    assert_eq!(
        get(&services, GUEST, ALL).await.1,
        "[]\n",
        "closed with its grant"
    );
}

#[tokio::test]
async fn in_mode_ask_podmans_port_is_the_loopbacks_and_told_so_and_asked_anew_once_it_is_closed() {
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Ask).await;
    let services = of(&world, "one");
    let podmans = r#"{"local":":8080","remote":"192.168.127.2:80","protocol":"tcp"}"#;
    let request = format!(
        "POST {EXPOSE} HTTP/1.1\r\nHost: gateway\r\nContent-Length: {}\r\n\r\n{podmans}",
        podmans.len()
    );
    let client = world.connection().open().await.unwrap();
    for _ in 0..2 {
        let waiting = {
            let (services, request) = (Arc::clone(&services), request.clone());
            tokio::spawn(async move { raw(&services, GUEST, &request).await })
        };
        let asked = the_request(&world).await;
        assert_eq!(
            crate::output::words::target(asked.target.as_ref()),
            "to open tcp 127.0.0.1:8080 to its port 80"
        );
        let approve = crate::client::unary(v1::ApproveRequest {
            id: asked.id,
            ..Default::default()
        });
        let grant = client
            .pending()
            .approve(approve)
            .await
            .unwrap()
            .into_inner()
            .grant;
        let answer = waiting.await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("X-Vnet-Listen: 127.0.0.1:8080\r\n"), "{answer}");
        let forwards = v1::ListForwardsRequest::default();
        let forwards = client
            .forwards()
            .list_forwards(crate::client::unary(forwards))
            .await
            .unwrap();
        let listens: Vec<String> = forwards
            .into_inner()
            .forwards
            .into_iter()
            .map(|f| f.listen)
            .collect();
        assert_eq!(listens, ["127.0.0.1:8080"]);
        let id = grant.unwrap().id;
        let revoke = crate::client::unary(v1::RevokeGrantRequest { id });
        client.grants().revoke_grant(revoke).await.unwrap();
    }
}

#[tokio::test]
async fn what_waits_for_a_person_keeps_a_guest_from_nothing_else_and_one_more_is_told_to_wait_its_turn() {
    use vnet_controlplane::hub::WAITS_PER_VM_MAX;
    const { assert!(WAITS_PER_VM_MAX < GUEST_CONNECTIONS_MAX) };
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Ask).await;
    let services = of(&world, "one");
    let wanted = |port: usize| format!(r#"{{"local":"127.0.0.1:{port}","remote":":80"}}"#);
    let expose = |port: usize| {
        let services = Arc::clone(&services);
        tokio::spawn(async move { post(&services, GUEST, EXPOSE, &wanted(port)).await })
    };
    let client = world.connection().open().await.unwrap();
    let open = async |count: usize| loop {
        let list = crate::client::unary(v1::ListPendingRequest::default());
        let open = client.pending().list_pending(list).await.unwrap().into_inner();
        if open.requests.len() == count {
            return open.requests;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    };
    let mut waiting: Vec<_> = (0..WAITS_PER_VM_MAX).map(|n| expose(8000 + n)).collect();
    open(WAITS_PER_VM_MAX).await;

    let (status, text) = post(&services, GUEST, EXPOSE, &wanted(7000)).await;
    assert_eq!(
        (status, text),
        (
            503,
            format!(
                "VM one waits for answers about {WAITS_PER_VM_MAX} forwards already, which is the most; answer or \
                 deny those first: vnetctl pending list\n"
            )
        )
    );
    // More of them at once than there are connections left, one after another.
    for _ in 0..GUEST_CONNECTIONS_MAX {
        assert_eq!(get(&services, GUEST, ALL).await, (200, "[]\n".to_owned()));
        let unexpose = post(&services, GUEST, UNEXPOSE, r#"{"local":"127.0.0.1:1"}"#).await;
        assert_eq!(unexpose, refused(500, "proxy not found"));
    }
    let first = open(WAITS_PER_VM_MAX).await[0].id.clone();
    let deny = crate::client::unary(v1::DenyRequest {
        id: first,
        ..Default::default()
    });
    client.pending().deny(deny).await.unwrap();
    // Its place is free, and that it was refused has left nothing behind.
    waiting.push(expose(7000));
    open(WAITS_PER_VM_MAX).await;
    for call in &waiting {
        call.abort();
    }
}

#[tokio::test]
async fn a_guest_that_is_refused_is_told_why_with_403() {
    let world = World::start().await;
    let _strict = world.dataplane("strict", v1::Mode::Enforce).await;
    let _asks = world.dataplane("asks", v1::Mode::Ask).await;
    for (network, body, told) in [
        ("strict", WANTED, "no rule of forwards: allows it"),
        (
            "asks",
            r#"{"local":"0.0.0.0:8080","remote":":80"}"#,
            "; under a policy or mode, ask for 127.0.0.1:8080",
        ),
        (
            "strict",
            r#"{"local":":8080","remote":":80"}"#,
            "tcp 127.0.0.1:8080 is not opened: no rule of forwards: allows it",
        ),
        (
            "asks",
            r#"{"local":"127.0.0.1:0","remote":":80"}"#,
            "port 0 stands for any port",
        ),
    ] {
        let (status, text) = post(&of(&world, network), GUEST, EXPOSE, body).await;
        assert_eq!(status, 403, "{text}");
        assert!(text.contains(told), "{text}");
    }
}

#[tokio::test]
async fn a_no_is_told_to_the_guest_and_the_next_attempt_asks_nobody() {
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Ask).await;
    let services = of(&world, "one");
    let waiting = {
        let services = Arc::clone(&services);
        tokio::spawn(async move { post(&services, GUEST, EXPOSE, WANTED).await })
    };
    let request = the_request(&world).await;
    let client = world.connection().open().await.unwrap();
    let deny = crate::client::unary(v1::DenyRequest {
        id: request.id,
        ..Default::default()
    });
    client.pending().deny(deny).await.unwrap();

    for answer in [
        waiting.await.unwrap(),
        post(&services, GUEST, EXPOSE, WANTED).await,
    ] {
        assert_eq!(answer.0, 403, "{answer:?}");
        assert!(answer.1.contains("denies it"), "{answer:?}");
    }
}
