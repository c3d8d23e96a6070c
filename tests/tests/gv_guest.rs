//! What a guest asks for at `http://GATEWAY/services/forwarder`, under no policy, under mode ask, and under rules; and
//! what it is answered for all else that it could post, there and at a socket that carries `/connect`.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use vnet_tests::{Ended, Running, World, eventually, id, staged};

/// The hardware addresses of the two guests; 192.168.127.2 is kept for the first.
const MACS: [&str; 2] = ["5a:94:ef:e4:0c:ee", "5a:94:ef:e4:0c:01"];

/// What a guest's script begins with: `ask NAME VERB BODY [HEADER]` leaves the answer in NAME.body and NAME.head, and its
/// status in NAME.code when it is there.
const ASK: &str = "
ask() {
    curl -sS -m 60 -o $1.body -D $1.head -w '%{http_code}' -d \"$3\" -H \"${4:-Accept: */*}\" \
        http://192.168.127.1/services/forwarder/$2 > $1.part && mv $1.part $1.code
}
serve() { echo this is the guest > index.html; exec python3 -m http.server 80 > /dev/null 2>&1; }
";

/// A guest that runs a script in a directory of its own.
fn guest(world: &World, socket: &Path, number: usize, script: &str) -> (Running, PathBuf) {
    let directory = world.work().join(format!("guest{number}"));
    fs::create_dir(&directory).unwrap();
    let script = format!("cd guest{number}\n{ASK}\n{script}");
    let mut guest = world.load();
    guest
        .args(["guest", "--mac", MACS[number]])
        .args(["--address", &format!("192.168.127.{}/24", number + 2)])
        .arg("--socket")
        .arg(socket)
        .args(["--", "sh", "-c", &script]);
    (Running::start(guest), directory)
}

/// The status and text of an answer, once it is there.
fn answered(directory: &Path, name: &str) -> (String, String) {
    let code = directory.join(format!("{name}.code"));
    eventually(&format!("the guest is answered: {name}"), || code.exists());
    let body = fs::read_to_string(directory.join(format!("{name}.body"))).unwrap_or_default();
    (fs::read_to_string(code).unwrap(), body)
}

fn is_answered(directory: &Path, name: &str, status: &str, text: &str) {
    let (code, body) = answered(directory, name);
    assert_eq!(code, status, "{name}: {body}");
    assert!(body.contains(text), "{name}: {body}");
}

/// gvproxy, once its guests can come.
fn gvproxy(world: &World, flags: &[&str], variables: &[(&str, &str)]) -> (Running, PathBuf) {
    let socket = world.runtime_dir().join("qemu.sock");
    let qemu = format!("unix://{}", socket.display());
    let mut command = world.gvproxy(&[&["-listen-qemu", &qemu], flags].concat());
    command.env("VNET_VM", "web").envs(variables.iter().copied());
    let running = Running::start(command);
    eventually("its socket is there", || socket.exists());
    (running, socket)
}

/// What the host gets from one of its own ports.
fn fetch(world: &World, at: &str) -> Ended {
    let mut curl = world.program("curl");
    curl.args(["-sS", "-m", "5", &format!("http://{at}/")]);
    Running::start(curl).wait()
}

fn is_served(world: &World, at: &str) {
    eventually("the guest's page is there", || {
        fetch(world, at).stdout == "this is the guest\n"
    });
}

/// The id of the request for this, once it is there; it is listed in words.
fn asked(world: &World, words: &str) -> String {
    eventually("it is asked for", || {
        world.vnetctl(&["pending", "list"]).contains(words)
    });
    world.first_pending_id()
}

#[test]
fn in_secure_mode_a_guest_asks_and_a_person_answers() {
    staged(in_secure_mode_a_guest_asks_and_a_person_answers, |world| {
        let (_gvproxy, socket) = gvproxy(world, &["-secure-mode"], &[]);
        let script = r#"serve &
ask yes expose '{"local":"127.0.0.1:8080","remote":":80"}'
ask podmans expose '{"local":":8081","remote":"192.168.127.2:80","protocol":"tcp"}'
ask beyond expose '{"local":"0.0.0.0:8081","remote":":80"}'
ask no expose '{"local":"127.0.0.1:8082","remote":"192.168.127.2:80","protocol":"udp"}'
ask again expose '{"local":"127.0.0.1:8082","remote":":80","protocol":"udp"}'
exec sleep 60"#;
        let (_guest, directory) = guest(world, &socket, 0, script);

        let request = asked(world, "to open tcp 127.0.0.1:8080 to its port 80");
        let shown = world.vnetctl(&["pending", "show", &request]);
        assert!(
            shown.contains("to open tcp 127.0.0.1:8080 to its port 80"),
            "{shown}"
        );
        assert_ne!(fetch(world, "127.0.0.1:8080").code, 0, "not yet");
        world.vnetctl(&["approve", &request]);
        is_answered(&directory, "yes", "200", "");
        is_served(world, "127.0.0.1:8080");

        // Without an address it is the loopback's, and its answer says so.
        let request = asked(world, "to open tcp 127.0.0.1:8081 to its port 80");
        world.vnetctl(&["approve", &request]);
        is_answered(&directory, "podmans", "200", "");
        let head = fs::read_to_string(directory.join("podmans.head")).unwrap();
        assert!(head.contains("X-Vnet-Listen: 127.0.0.1:8081\r\n"), "{head}");
        is_served(world, "127.0.0.1:8081");
        assert_ne!(
            fetch(world, "203.0.113.1:8081").code,
            0,
            "not at the host's other addresses"
        );

        is_answered(
            &directory,
            "beyond",
            "403",
            "0.0.0.0 is not an address of loopback, where alone a VM may open a port (expected 127.0.0.1 or [::1]); \
             under a policy or mode, ask for 127.0.0.1:8081",
        );

        let request = asked(world, "to open udp 127.0.0.1:8082 to its port 80");
        world.vnetctl(&["deny", &request]);
        for name in ["no", "again"] {
            is_answered(&directory, name, "403", "denies it");
        }

        let events = world.vnetctl(&["events", "list"]);
        assert!(
            events.contains("web asks to open tcp 127.0.0.1:8080 to its port 80"),
            "{events}"
        );
        let grants = world.vnetctl(&["grants", "list"]);
        assert!(
            grants.contains("to open tcp 127.0.0.1:8080 to its port 80"),
            "{grants}"
        );
        let granted = world.list(&["grants", "list"]);
        for yes in granted.iter().filter(|grant| grant["action"] == "ACTION_ALLOW") {
            world.vnetctl(&["grants", "revoke", &id(yes)]);
        }
        for at in ["127.0.0.1:8080", "127.0.0.1:8081"] {
            assert_ne!(fetch(world, at).code, 0, "closed with its grant: {at}");
        }
        assert_eq!(world.list(&["forward", "list"]).len(), 1, "SSH's alone is left");
    });
}

#[test]
fn in_secure_mode_what_a_guest_opened_ends_with_it_and_its_successor_has_nothing_of_it() {
    staged(
        in_secure_mode_what_a_guest_opened_ends_with_it_and_its_successor_has_nothing_of_it,
        |world| {
            let (_gvproxy, socket) = gvproxy(world, &["-secure-mode"], &[]);
            let script =
                "serve &\nask yes expose '{\"local\":\"127.0.0.1:8080\",\"remote\":\":80\"}'\nexec sleep 60";
            let (first, directory) = guest(world, &socket, 0, script);
            let request = asked(world, "to open tcp 127.0.0.1:8080 to its port 80");
            world.vnetctl(&["approve", "--forever", &request]);
            is_answered(&directory, "yes", "200", "");
            is_served(world, "127.0.0.1:8080");

            drop(first);
            eventually("SSH's alone is left", || {
                world.list(&["forward", "list"]).len() == 1
            });
            fs::remove_dir_all(directory).unwrap();
            let (_next, directory) = guest(world, &socket, 0, "serve &\necho > up\nexec sleep 60");
            eventually("the next one is up", || directory.join("up").exists());
            eventually("it is the one that is there", || {
                let vms = world.list(&["vm", "list"]);
                matches!(&vms[..], [vm] if vm["name"] == "web" && vm["state"] == "VM_STATE_ATTACHED")
            });
            assert_ne!(fetch(world, "127.0.0.1:8080").code, 0, "it opened none");
        },
    );
}

#[test]
fn under_a_policy_rules_say_what_a_guest_opens() {
    staged(under_a_policy_rules_say_what_a_guest_opens, |world| {
        let policy = "version: 1
forwards:
  - {action: deny, listen: 8443, comment: that one is ours}
  - {action: allow, protocol: tcp, listen: \"127.0.0.1:8000-8999\", guestPorts: 80}
";
        let policy = world.file("policy.yaml", policy);
        let flags = ["-network-policy", &policy.display().to_string()];
        let (_gvproxy, socket) = gvproxy(world, &flags, &[]);
        let script = r#"serve &
ask allowed expose '{"local":"127.0.0.1:8080","remote":":80"}'
ask denied expose '{"local":"127.0.0.1:8443","remote":":80"}'
ask other expose '{"local":"127.0.0.1:9000","remote":":80"}'
ask port expose '{"local":"127.0.0.1:8081","remote":":22"}'
ask beyond expose '{"local":"0.0.0.0:8080","remote":":80"}'
ask all all ''
exec sleep 60"#;
        let (_guest, directory) = guest(world, &socket, 0, script);

        is_answered(&directory, "allowed", "200", "");
        is_served(world, "127.0.0.1:8080");
        is_answered(&directory, "denied", "403", "denies it (that one is ours)");
        is_answered(&directory, "other", "403", "no rule of forwards: allows it");
        is_answered(&directory, "port", "403", "no rule of forwards: allows it");
        is_answered(&directory, "beyond", "403", "is not an address of loopback");
        let only = "[{\"local\":\"127.0.0.1:8080\",\"remote\":\"192.168.127.2:80\",\"protocol\":\"tcp\"}]\n";
        assert_eq!(answered(&directory, "all"), ("200".to_owned(), only.to_owned()));
        assert!(world.pending().is_empty(), "nobody is asked");
    });
}

#[test]
fn without_a_policy_it_works_as_podman_expects_and_touches_nothing_else() {
    staged(
        without_a_policy_it_works_as_podman_expects_and_touches_nothing_else,
        |world| {
            let secret = "0123456789abcdef0123456789abcdef";
            let token = world.file("token", secret).display().to_string();
            let (_gvproxy, socket) = gvproxy(world, &[], &[("VNET_GUEST_API_TOKEN_FILE", &token)]);
            let precious = world.file("precious", "precious");
            let bearer = format!("'Authorization: Bearer {secret}'");
            let script = format!(
                r#"serve &
ask without expose '{{"local":":8080","remote":":80"}}'
ask open expose '{{"local":":8080","remote":":80"}}' {bearer}
ask file unexpose '{{"local":"{path}","protocol":"unix"}}' {bearer}
ask unix expose '{{"local":"{path}","remote":"tcp://192.168.127.2:80","protocol":"unix"}}' {bearer}
ask other expose '{{"local":":8081","remote":"192.168.127.3:80"}}' {bearer}
exec sleep 60"#,
                path = precious.display()
            );
            let (_one, directory) = guest(world, &socket, 0, &script);
            is_answered(&directory, "without", "401", "a token is needed");
            is_answered(&directory, "open", "200", "");
            is_served(world, "127.0.0.1:8080");
            is_answered(&directory, "file", "500", "proxy not found");
            is_answered(
                &directory,
                "unix",
                "403",
                "a guest can expose tcp and udp, and nothing else",
            );
            is_answered(
                &directory,
                "other",
                "403",
                "a guest can expose its own address alone",
            );
            assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");

            let script = format!(
                r#"ask all all '' {bearer}
ask end unexpose '{{"local":":8080"}}' {bearer}
exec sleep 60"#
            );
            let (_two, directory) = guest(world, &socket, 1, &script);
            assert_eq!(
                answered(&directory, "all"),
                ("200".to_owned(), "[]\n".to_owned()),
                "another guest's are not listed"
            );
            is_answered(&directory, "end", "500", "proxy not found");
            is_served(world, "127.0.0.1:8080");
        },
    );
}

#[test]
fn a_mode_that_comes_closes_what_a_guest_opened_before_it() {
    staged(a_mode_that_comes_closes_what_a_guest_opened_before_it, |world| {
        let (_gvproxy, socket) = gvproxy(world, &[], &[]);
        let script = r#"serve &
ask open expose '{"local":":8080","remote":":80"}'
until [ -e go ]; do sleep 0.05; done
ask again expose '{"local":":8080","remote":":80"}'
exec sleep 60"#;
        let (_guest, directory) = guest(world, &socket, 0, script);
        is_answered(&directory, "open", "200", "");
        is_served(world, "203.0.113.1:8080");
        world.vnetctl(&["vm", "mode", "web", "ask"]);
        assert_ne!(fetch(world, "203.0.113.1:8080").code, 0, "closed");
        assert_eq!(world.list(&["forward", "list"]).len(), 1, "SSH's alone is left");
        // It may ask for it again, and what it is under decides.
        fs::write(directory.join("go"), "").unwrap();
        let request = asked(world, "to open tcp 127.0.0.1:8080 to its port 80");
        world.vnetctl(&["approve", &request]);
        is_answered(&directory, "again", "200", "");
        is_served(world, "127.0.0.1:8080");
        assert_ne!(fetch(world, "203.0.113.1:8080").code, 0, "at the loopback alone");
    });
}

/// What a guest posts, and its body; PORT is another one each way.
const POSTS: [(&str, &str); 25] = [
    ("/network/pending", "{}"),
    ("/network/approved", "{}"),
    ("/network/connections", "{}"),
    ("/network/allow", ANSWER),
    ("/network/deny", ANSWER),
    ("/network/events", "{}"),
    ("/services/network/pending", "{}"),
    ("/services/network/approved", "{}"),
    ("/services/network/connections", "{}"),
    ("/services/network/allow", ANSWER),
    ("/services/network/deny", ANSWER),
    ("/services/network/events", "{}"),
    ("/dns/pending", "{}"),
    ("/dns/denied", "{}"),
    ("/dns/allowed", "{}"),
    ("/dns/allow", r#"{"domain":"github.com"}"#),
    ("/services/dns/pending", "{}"),
    ("/services/dns/denied", "{}"),
    ("/services/dns/allowed", "{}"),
    ("/services/dns/allow", r#"{"domain":"github.com"}"#),
    ("/services/dns/all", "{}"),
    ("/services/dns/add", r#"{"Name":"guest.internal."}"#),
    ("/services/forwarder/all", "{}"),
    (
        "/services/forwarder/expose",
        r#"{"local":"127.0.0.1:PORT","remote":"192.168.127.2:80"}"#,
    ),
    ("/services/forwarder/unexpose", r#"{"local":"127.0.0.1:PORT"}"#),
];
const ANSWER: &str = r#"{"protocol":"tcp","ip":"203.0.113.10","port":80}"#;

/// The ways of a guest's posts: the gateway's port 80; a Unix socket of `-listen`, as a process that serves the guest has
/// it; and one of loopback, by the host's alias.
const WAYS: [&str; 3] = ["gateway", "listen", "alias"];

/// The statuses of what a guest posts, by way and path; and the gvproxy, which still runs.
fn posted(world: &World, flags: &[&str]) -> (BTreeMap<(String, String), u16>, Running) {
    let listen = world.runtime_dir().join("listen.sock").display().to_string();
    let on_listen = format!("unix://{listen}");
    let sockets = ["-listen", &on_listen, "-listen", "tcp://127.0.0.1:7790"];
    let (gvproxy, socket) = gvproxy(world, &[&sockets, flags].concat(), &[]);
    let posts: String = POSTS
        .iter()
        .map(|(path, body)| format!("{path} {body}\n"))
        .collect();
    world.file("posts", &posts);
    let script = format!(
        r#"ping -c 1 -W 5 192.168.127.1 > /dev/null
post() {{
    way=$1 port=$2; shift 2
    code=$(curl -sS -m 10 -o /dev/null -w '%{{http_code}}' -d "$(echo "$body" | sed s/PORT/$port/)" "$@" 2> /dev/null)
    echo "$way $path $code"
}}
while read -r path body; do
    post gateway 8085 http://192.168.127.1$path
    post listen 8086 --unix-socket {listen} http://vnet$path
    post alias 8087 http://192.168.127.254:7790$path
done < ../posts"#
    );
    let (guest, _) = guest(world, &socket, 0, &script);
    let ended = guest.wait();
    let statuses: BTreeMap<(String, String), u16> = ended
        .stdout
        .lines()
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let [way, path, code] = words[..] else {
                panic!("{ended:?}")
            };
            ((way.to_owned(), path.to_owned()), code.parse().unwrap())
        })
        .collect();
    assert_eq!(statuses.len(), POSTS.len() * WAYS.len(), "{ended:?}");
    // Nobody was answered for, whoever asked.
    assert!(world.list(&["grants", "list"]).is_empty());
    (statuses, gvproxy)
}

/// What each is answered: 404 by the gateway, but for its three verbs; 403 where a VM can come by, but for `of_listen`
/// verbs of forwards and zones; nothing where the dataplane itself listens, which is closed to guests.
fn are_answered(statuses: &BTreeMap<(String, String), u16>, of_gateway: [u16; 3], of_listen: u16) {
    let verbs = ["all", "expose", "unexpose"].map(|verb| format!("/services/forwarder/{verb}"));
    for ((way, path), status) in statuses {
        let verb = verbs.iter().position(|verb| verb == path);
        let is_zone = matches!(path.as_str(), "/services/dns/all" | "/services/dns/add");
        let expected = match way.as_str() {
            "gateway" => verb.map_or(404, |verb| of_gateway[verb]),
            "listen" if verb.is_some() || is_zone => of_listen,
            "listen" => 403,
            _ => 0,
        };
        assert_eq!(*status, expected, "{way} {path}");
    }
}

#[test]
fn a_guest_that_posts_each_path_without_a_policy_answers_nobodys_question() {
    staged(
        a_guest_that_posts_each_path_without_a_policy_answers_nobodys_question,
        |world| are_answered(&posted(world, &[]).0, [200, 200, 200], 200),
    );
}

#[test]
fn a_guest_that_posts_each_path_under_a_policy_changes_nothing() {
    staged(
        a_guest_that_posts_each_path_under_a_policy_changes_nothing,
        |world| {
            let policy = world.file("policy.yaml", "version: 1\n").display().to_string();
            let (statuses, _gvproxy) = posted(world, &["-network-policy", &policy]);
            are_answered(&statuses, [200, 403, 500], 403);
            changed_nothing(world);
            assert!(world.pending().is_empty(), "nobody is asked");
        },
    );
}

#[test]
fn a_guest_that_posts_each_path_in_secure_mode_asks_for_one_port_and_changes_nothing() {
    staged(
        a_guest_that_posts_each_path_in_secure_mode_asks_for_one_port_and_changes_nothing,
        |world| {
            let policy = "version: 1\napprovalTimeout: 1s\n";
            let policy = world.file("policy.yaml", policy).display().to_string();
            let (statuses, _gvproxy) = posted(world, &["-secure-mode", "-network-policy", &policy]);
            are_answered(&statuses, [200, 504, 500], 403);
            changed_nothing(world);
            // The guest is gone, and its request with it.
            let asked = world.list(&["events", "list", "--kind", "pending-opened"]);
            assert_eq!(asked.len(), 1, "{asked:?}");
            assert_eq!(
                asked[0]["text"],
                "web asks to open tcp 127.0.0.1:8085 to its port 80"
            );
        },
    );
}

fn changed_nothing(world: &World) {
    assert_eq!(world.list(&["forward", "list"]).len(), 1, "SSH's alone");
    let zones = world.vnetctl(&["dns", "zones"]);
    assert!(!zones.contains("guest.internal"), "{zones}");
}
