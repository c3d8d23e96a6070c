//! `/services/forwarder`, as gvproxy answers it.

use vnet_proto::v1;

use super::world::{World, config};
use super::*;
use crate::cmd::tests::scripted::Scripted;

const ALL: &str = "/services/forwarder/all";
const EXPOSE: &str = "/services/forwarder/expose";
const UNEXPOSE: &str = "/services/forwarder/unexpose";
const SERVICES: Origin = Origin::Services;
const GUEST: Origin = Origin::Guest(Guest {
    vm: vnet_proto::model::VmId(1),
    address: std::net::IpAddr::V4(Ipv4Addr::new(192, 168, 127, 2)),
});

#[tokio::test]
async fn what_is_exposed_is_answered_byte_for_byte_as_gvproxy_does() {
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Unspecified).await;
    let services = world.services("one");
    let body = r#"{"local":"127.0.0.1:9191","remote":"192.168.127.2:80","protocol":"tcp"}"#;
    let request = format!(
        "POST {EXPOSE} HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: {}\r\n\
         Content-Type: application/json\r\n\r\n{body}",
        body.len()
    );

    let exposed = raw(&services, SERVICES, &request).await;
    let again = raw(&services, SERVICES, &request).await;
    let all = raw(
        &services,
        SERVICES,
        &format!("GET {ALL} HTTP/1.1\r\nHost: x\r\n\r\n"),
    )
    .await;

    assert_eq!(exposed, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    let text = "proxy already running for tcp on 127.0.0.1:9191\n";
    assert_eq!(
        again,
        format!(
            "HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain; charset=utf-8\r\n\
             X-Content-Type-Options: nosniff\r\nX-Vnet-Remedy: unexpose it first, or expose another port\r\n\
             Content-Length: {}\r\n\r\n{text}",
            text.len()
        )
    );
    let list = "[{\"local\":\"127.0.0.1:9191\",\"remote\":\"192.168.127.2:80\",\"protocol\":\"tcp\"}]\n";
    assert_eq!(
        all,
        format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n\r\n{list}",
            list.len()
        )
    );
}

#[tokio::test]
async fn forwards_are_listed_in_order_and_only_those_of_the_network() {
    let world = World::start().await;
    let _one = world.dataplane("one", v1::Mode::Unspecified).await;
    let _two = world.dataplane("two", v1::Mode::Unspecified).await;
    let (one, two) = (world.services("one"), world.services("two"));
    assert_eq!(get(&one, SERVICES, ALL).await, (200, "[]\n".to_owned()));
    for body in [
        r#"{"local":":6443","remote":"192.168.127.2:6443"}"#,
        r#"{"local":"127.0.0.1:53","remote":"192.168.127.2:53","protocol":"udp"}"#,
        r#"{"Local":"127.0.0.1:53","REMOTE":"192.168.127.2:53","more":[1]} trailing"#,
        r#"{"local":"127.0.0.1:0","remote":"192.168.127.2:1"}"#,
    ] {
        assert_eq!(post(&one, SERVICES, EXPOSE, body).await, done(), "{body}");
    }
    let expected = "[{\"local\":\"127.0.0.1:0\",\"remote\":\"192.168.127.2:1\",\"protocol\":\"tcp\"},\
        {\"local\":\"127.0.0.1:53\",\"remote\":\"192.168.127.2:53\",\"protocol\":\"tcp\"},\
        {\"local\":\"127.0.0.1:53\",\"remote\":\"192.168.127.2:53\",\"protocol\":\"udp\"},\
        {\"local\":\":6443\",\"remote\":\"192.168.127.2:6443\",\"protocol\":\"tcp\"}]\n";

    assert_eq!(get(&one, SERVICES, ALL).await, (200, expected.to_owned()));
    assert_eq!(post(&one, SERVICES, ALL, "").await.0, 200, "any method");
    assert_eq!(get(&two, SERVICES, ALL).await, (200, "[]\n".to_owned()));
    let unexpose = r#"{"local":":6443"}"#;
    assert_eq!(
        post(&two, SERVICES, UNEXPOSE, unexpose).await,
        refused(500, "proxy not found")
    );
    assert_eq!(
        get(&one, SERVICES, ALL).await.1,
        expected,
        "another network's are left alone"
    );
}

#[tokio::test]
async fn a_listener_without_a_host_has_both_families_and_both_end_with_it() {
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Unspecified).await;
    let services = world.services("one");
    let body = r#"{"local":":6443","remote":"192.168.127.2:6443"}"#;
    assert_eq!(post(&services, SERVICES, EXPOSE, body).await, done());
    let listens = || async {
        let forwards = services.control.list_forwards().await.ok().unwrap();
        forwards
            .into_iter()
            .map(|forward| forward.listen)
            .collect::<Vec<_>>()
    };
    assert_eq!(listens().await, ["0.0.0.0:6443", "[::]:6443"]);

    assert_eq!(
        post(&services, SERVICES, UNEXPOSE, r#"{"local":":6443"}"#).await,
        done()
    );

    assert_eq!(listens().await, Vec::<String>::new());
    assert_eq!(
        post(&services, SERVICES, EXPOSE, body).await,
        done(),
        "and may be exposed again"
    );
}

#[tokio::test]
async fn what_is_exposed_in_other_words_is_in_use_and_named_and_half_of_it_is_closed() {
    let world = World::start().await;
    let dataplane = world.dataplane("one", v1::Mode::Unspecified).await;
    let services = Services::new(ServicesConfig {
        guests: Some(GuestApi::default()),
        ..world.config("one")
    });
    let expose = async |origin, local: &str| {
        let body = format!(r#"{{"local":"{local}","remote":"192.168.127.2:80"}}"#);
        let request = format!(
            "POST {EXPOSE} HTTP/1.1\r\nHost: gateway\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        raw(&services, origin, &request).await
    };
    assert!(expose(SERVICES, ":8080").await.starts_with("HTTP/1.1 200 "));
    let named =
        "X-Vnet-Remedy: :8080 is exposed already, and has it: unexpose that, or expose another port\r\n";
    let any = "\nlisten tcp 0.0.0.0:8080: bind: address already in use\n";
    for origin in [SERVICES, Origin::Listen] {
        let answer = expose(origin, "0.0.0.0:8080").await;
        assert!(answer.contains(named) && answer.ends_with(any), "{answer}");
    }
    // A guest is told of its own alone.
    let answer = expose(GUEST, "0.0.0.0:8080").await;
    assert!(
        answer.contains("X-Vnet-Remedy: expose another port\r\n") && answer.ends_with(any),
        "{answer}"
    );
    // The same one it is by the same words.
    let answer = expose(SERVICES, ":8080").await;
    assert!(
        answer.ends_with("\nproxy already running for tcp on :8080\n"),
        "{answer}"
    );

    // Where one family is taken nothing stays of the other, and the refusal is told.
    dataplane.is_busy("[::]:8081");
    let answer = expose(SERVICES, ":8081").await;
    assert!(
        answer.ends_with("\nlisten tcp :8081: bind: address already in use\n"),
        "{answer}"
    );
    assert!(!get(&services, SERVICES, ALL).await.1.contains("8081"));
}

#[tokio::test]
async fn what_others_opened_is_listed_by_where_it_listens_and_can_be_ended() {
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Unspecified).await;
    let services = world.services("one");
    let other = world.services("one");
    let udp = r#"{"local":":53","remote":"192.168.127.2:53","protocol":"udp"}"#;
    let tcp = r#"{"local":"127.0.0.1:2222","remote":"192.168.127.2:22"}"#;
    for body in [udp, tcp] {
        assert_eq!(post(&other, SERVICES, EXPOSE, body).await, done());
    }
    let all = get(&services, SERVICES, ALL).await.1;
    assert_eq!(
        all,
        "[{\"local\":\"0.0.0.0:53\",\"remote\":\"192.168.127.2:53\",\"protocol\":\"udp\"},\
         {\"local\":\"127.0.0.1:2222\",\"remote\":\"192.168.127.2:22\",\"protocol\":\"tcp\"},\
         {\"local\":\"[::]:53\",\"remote\":\"192.168.127.2:53\",\"protocol\":\"udp\"}]\n"
    );
    assert_eq!(
        post(&services, SERVICES, EXPOSE, tcp).await,
        refused(500, "proxy already running for tcp on 127.0.0.1:2222")
    );
    services.adopt(
        false,
        "localhost:2222",
        "192.168.127.2:22",
        &["127.0.0.1:2222".parse().unwrap()],
    );
    assert!(
        get(&services, SERVICES, ALL)
            .await
            .1
            .contains("\"localhost:2222\"")
    );
    for local in [
        r#"{"local":":53","protocol":"udp"}"#,
        r#"{"local":"localhost:2222"}"#,
    ] {
        assert_eq!(
            post(&services, SERVICES, UNEXPOSE, local).await,
            done(),
            "{local}"
        );
    }
    assert_eq!(get(&services, SERVICES, ALL).await.1, "[]\n");
    assert_eq!(
        get(&other, SERVICES, ALL).await.1,
        "[]\n",
        "what is gone is forgotten"
    );
    assert_eq!(post(&other, SERVICES, EXPOSE, tcp).await, done());
}

#[tokio::test]
async fn refusals_have_gvproxys_status_and_text() {
    let world = World::start().await;
    let dataplane = world.dataplane("one", v1::Mode::Unspecified).await;
    dataplane.is_busy("127.0.0.1:9191");
    dataplane.is_busy("0.0.0.0:9191");
    let file = std::env::temp_dir().join(format!("vnet-gv-file-{}", std::process::id()));
    std::fs::write(&file, "precious").unwrap();
    let unix = |local: &str, remote: &str| {
        serde_json::json!({"local": local, "remote": remote, "protocol": "unix"}).to_string()
    };
    let expose = |local: &str, remote: &str, protocol: &str| {
        serde_json::json!({"local": local, "remote": remote, "protocol": protocol}).to_string()
    };
    let guest = "192.168.127.2:80";
    let in_use = format!("listen unix {}: bind: address already in use", file.display());
    let cases = [
        (
            EXPOSE,
            expose("127.0.0.1:9191", guest, "tcp"),
            500,
            "listen tcp 127.0.0.1:9191: bind: address already in use",
        ),
        (
            EXPOSE,
            expose("127.0.0.1:9191", guest, "udp"),
            500,
            "listen udp 127.0.0.1:9191: bind: address already in use",
        ),
        (
            EXPOSE,
            expose(":9191", guest, ""),
            500,
            "listen tcp :9191: bind: address already in use",
        ),
        (
            EXPOSE,
            expose("192.0.2.77:1", guest, "tcp"),
            500,
            "listen tcp 192.0.2.77:1: bind: cannot assign requested address",
        ),
        (
            EXPOSE,
            expose("127.0.0.1:1", guest, "sctp"),
            500,
            "unknown protocol sctp",
        ),
        (
            EXPOSE,
            expose("127.0.0.1:1", "foo", "sctp"),
            400,
            "address foo: missing port in address",
        ),
        (
            EXPOSE,
            expose("127.0.0.1:1", "foo", "tcp"),
            400,
            "address foo: missing port in address",
        ),
        (
            EXPOSE,
            expose("127.0.0.1:1", ":80", "tcp"),
            400,
            "address @: missing port in address",
        ),
        (
            EXPOSE,
            expose("127.0.0.1:1", "[fd00::2]:80", "tcp"),
            500,
            "invalid remote addr",
        ),
        (
            EXPOSE,
            expose("127.0.0.1:1", "web:80", "tcp"),
            400,
            "\"web\" is not an IPv4 address",
        ),
        (
            EXPOSE,
            expose("foo", guest, "tcp"),
            500,
            "listen tcp: address foo: missing port in address",
        ),
        (
            EXPOSE,
            expose("foo", guest, "udp"),
            500,
            "address foo: missing port in address",
        ),
        (
            EXPOSE,
            expose("x", "tcp://192.168.127.2:80", "npipe"),
            500,
            "named pipes are not supported by this platform",
        ),
        (
            EXPOSE,
            unix("/run/x.sock", "udp://192.168.127.2:80"),
            500,
            "remote protocol for unix forwarder is not implemented: udp",
        ),
        (
            EXPOSE,
            unix("x.sock", "tcp://192.168.127.2:80"),
            400,
            "listen unix x.sock: the path is not absolute",
        ),
        (
            EXPOSE,
            unix(&file.display().to_string(), "tcp://192.168.127.2:80"),
            500,
            &in_use,
        ),
        (
            EXPOSE,
            unix("/run/x.sock", "ssh-tunnel://a@192.168.127.2/s?key=k"),
            500,
            "no forwards over SSH are served here",
        ),
        (EXPOSE, String::new(), 400, "EOF"),
        (EXPOSE, "{".to_owned(), 400, "unexpected EOF"),
        (
            EXPOSE,
            "local=x".to_owned(),
            400,
            "invalid character 'l' looking for beginning of value",
        ),
        (
            EXPOSE,
            r#"{"local":80}"#.to_owned(),
            400,
            "json: cannot unmarshal number into Go struct field ExposeRequest.local of type string",
        ),
        (
            UNEXPOSE,
            r#"{"local":"127.0.0.1:1"}"#.to_owned(),
            500,
            "proxy not found",
        ),
        (
            UNEXPOSE,
            r#"{"local":"x","protocol":"sctp"}"#.to_owned(),
            500,
            "proxy not found",
        ),
        (
            UNEXPOSE,
            r#"{"local":":9191","protocol":"npipe"}"#.to_owned(),
            500,
            "proxy not found",
        ),
        (
            UNEXPOSE,
            "[]".to_owned(),
            400,
            "json: cannot unmarshal array into Go value of type types.UnexposeRequest",
        ),
    ];
    let services = world.services("one");
    for (path, body, status, text) in &cases {
        let answer = post(&services, SERVICES, path, body).await;
        assert_eq!(answer, refused(*status, text), "{path} {body}");
    }
    for path in [EXPOSE, UNEXPOSE] {
        assert_eq!(get(&services, SERVICES, path).await, refused(400, "post only"));
    }
    assert_eq!(
        get(&services, SERVICES, ALL).await.1,
        "[]\n",
        "nothing is left behind"
    );
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    std::fs::remove_file(&file).unwrap();
}

#[tokio::test]
async fn what_the_host_refuses_is_told_in_its_words_and_what_vnet_says_is_the_remedy() {
    let cases = [
        (
            tonic::Code::PermissionDenied,
            "NOT_PERMITTED",
            "not by this user",
            500,
            "listen tcp 127.0.0.1:80: bind: permission denied",
        ),
        (
            tonic::Code::InvalidArgument,
            "NO_SUCH_ADDRESS",
            "the host is elsewhere",
            500,
            "listen tcp 127.0.0.1:80: bind: cannot assign requested address",
        ),
        (
            tonic::Code::ResourceExhausted,
            "",
            "1024 forwards are open already; close one first",
            500,
            "1024 forwards are open already; close one first",
        ),
        (
            tonic::Code::Unavailable,
            "",
            "the dataplane does not answer",
            503,
            "the dataplane does not answer",
        ),
    ];
    for (code, problem, said, status, text) in cases {
        let server = Scripted::start();
        let refusal = if problem.is_empty() {
            tonic::Status::new(code, said)
        } else {
            let metadata = [("listen_problem".to_owned(), problem.to_owned())];
            let reason = "DATAPLANE_REFUSED";
            let details = tonic_types::ErrorDetails::with_error_info(reason, "vnet.v1", metadata);
            <tonic::Status as tonic_types::StatusExt>::with_error_details(code, said, details)
        };
        server.refuse("ForwardService/CreateForward", refusal);
        let services = Services::new(config(server.connection(), "one"));
        let body = r#"{"local":"127.0.0.1:80","remote":"192.168.127.2:80"}"#;
        let request = format!(
            "POST {EXPOSE} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = raw(&services, SERVICES, &request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        assert!(answer.ends_with(&format!("\r\n\r\n{text}\n")), "{answer}");
        if status == 500 {
            assert!(answer.contains(&format!("X-Vnet-Remedy: {said}\r\n")), "{answer}");
        }
        assert!(services.exposed.rows(None).is_empty());
    }
}

#[tokio::test]
async fn a_unix_socket_is_a_forward_of_the_dataplanes_by_its_url() {
    let server = Scripted::start();
    let services = Services::new(config(server.connection(), "one"));
    let body = r#"{"local":"/run/vnet-a b.sock","remote":"tcp://192.168.127.2:80","protocol":"unix"}"#;
    let forward = v1::Forward {
        protocol: v1::Protocol::Tcp.into(),
        listen: "unix:///run/vnet-a%20b.sock".to_owned(),
        target: "192.168.127.2:80".to_owned(),
        ..Default::default()
    };
    let mut opened = v1::CreateForwardResponse::default();
    opened.forward.replace(forward.clone());
    let list = v1::ListForwardsResponse {
        forwards: vec![forward.clone()],
    };
    server.answer("ForwardService/CreateForward", &opened);
    server.answer("ForwardService/ListForwards", &list);
    server.answer(
        "ForwardService/DeleteForward",
        &v1::DeleteForwardResponse::default(),
    );

    assert_eq!(post(&services, SERVICES, EXPOSE, body).await, done());
    let all =
        "[{\"local\":\"/run/vnet-a b.sock\",\"remote\":\"tcp://192.168.127.2:80\",\"protocol\":\"unix\"}]\n";
    assert_eq!(get(&services, SERVICES, ALL).await, (200, all.to_owned()));
    let unexpose = r#"{"local":"/run/vnet-a b.sock","protocol":"unix"}"#;
    assert_eq!(post(&services, SERVICES, UNEXPOSE, unexpose).await, done());

    let asked: Vec<v1::CreateForwardRequest> = server.asked("ForwardService/CreateForward");
    let asked = asked[0].forward.clone().unwrap();
    assert_eq!((asked.network.as_str(), &asked.listen), ("one", &forward.listen));
    assert_eq!(asked.target, "192.168.127.2:80");
    let deleted: Vec<v1::DeleteForwardRequest> = server.asked("ForwardService/DeleteForward");
    assert_eq!(deleted[0].listen, forward.listen);

    // One that others opened, listed by its path and ended by it; and one whose path is taken.
    server.answer("ForwardService/ListForwards", &list);
    server.answer(
        "ForwardService/DeleteForward",
        &v1::DeleteForwardResponse::default(),
    );
    assert_eq!(post(&services, SERVICES, UNEXPOSE, unexpose).await, done());
    let taken =
        tonic::Status::already_exists("it is there already and somebody listens; it is left as it is");
    server.refuse("ForwardService/CreateForward", taken);
    server.answer(
        "ForwardService/ListForwards",
        &v1::ListForwardsResponse::default(),
    );
    assert_eq!(
        post(&services, SERVICES, EXPOSE, body).await,
        refused(
            500,
            "listen unix /run/vnet-a b.sock: bind: address already in use"
        )
    );
}

/// Keeps what it was asked.
#[derive(Default)]
struct Recorded(std::sync::Mutex<Vec<String>>);

#[tonic::async_trait]
impl SshTunnels for Recorded {
    async fn expose(&self, local: &str, remote: &str) -> Result<(), String> {
        self.0.lock().unwrap().push(format!("expose {local} {remote}"));
        if remote.contains("key=") {
            Ok(())
        } else {
            Err("key not provided for unix-ssh connection\nadd ?key=FILE".to_owned())
        }
    }

    fn unexpose(&self, local: &str) {
        self.0.lock().unwrap().push(format!("unexpose {local}"));
    }
}

#[tokio::test]
async fn sockets_over_ssh_come_and_go_and_show_no_passphrase() {
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Unspecified).await;
    let ssh = Arc::new(Recorded::default());
    let services = Services::new(ServicesConfig {
        ssh: Arc::clone(&ssh) as Arc<dyn SshTunnels>,
        ..world.config("one")
    });
    let remote = "ssh-tunnel://core@192.168.127.2/run/p.sock?key=/k&passphrase=secret";
    let body =
        serde_json::json!({"local": "/run/vnet-none.sock", "remote": remote, "protocol": "unix"}).to_string();

    assert_eq!(post(&services, SERVICES, EXPOSE, &body).await, done());
    assert_eq!(
        post(&services, SERVICES, EXPOSE, &body).await,
        refused(500, "proxy already running for unix on /run/vnet-none.sock")
    );
    let all = get(&services, SERVICES, ALL).await.1;
    assert_eq!(
        all,
        "[{\"local\":\"/run/vnet-none.sock\",\"remote\":\"ssh-tunnel://core@192.168.127.2/run/p.sock?key=/k\
         \\u0026passphrase=xxxxx\",\"protocol\":\"unix\"}]\n"
    );
    // What helps at a path is another path.
    let length = body.len();
    let request = format!("POST {EXPOSE} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}");
    let answer = raw(&services, SERVICES, &request).await;
    assert!(
        answer.contains("X-Vnet-Remedy: unexpose it first, or expose at another path\r\n"),
        "{answer}"
    );
    let unexpose = r#"{"local":"/run/vnet-none.sock","protocol":"unix"}"#;
    assert_eq!(post(&services, SERVICES, UNEXPOSE, unexpose).await, done());
    assert_eq!(
        post(&services, SERVICES, UNEXPOSE, unexpose).await,
        refused(500, "proxy not found")
    );
    let without = body.replace("key=", "kay=");
    assert_eq!(
        post(&services, SERVICES, EXPOSE, &without).await,
        refused(500, "key not provided for unix-ssh connection")
    );
    let asked = ssh.0.lock().unwrap().clone();
    assert_eq!(asked.len(), 3);
    assert_eq!(asked[0], format!("expose /run/vnet-none.sock {remote}"));
    assert_eq!(asked[1], "unexpose /run/vnet-none.sock");
}
