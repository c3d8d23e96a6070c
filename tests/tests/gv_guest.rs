//! What a guest asks for at `http://GATEWAY/services/forwarder`, under no policy, under mode ask, and under rules.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::{Path, PathBuf};

use vnet_tests::{Ended, Running, World, eventually, id, staged};

/// The hardware addresses of the two guests; 192.168.127.2 is kept for the first.
const MACS: [&str; 2] = ["5a:94:ef:e4:0c:ee", "5a:94:ef:e4:0c:01"];

/// What a guest's script begins with: `ask NAME VERB BODY [HEADER]` leaves the answer in NAME.body, and its status in
/// NAME.code when it is there.
const ASK: &str = "
ask() {
    curl -sS -m 60 -o $1.body -w '%{http_code}' -d \"$3\" -H \"${4:-Accept: */*}\" \
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
ask beyond expose '{"local":":8081","remote":":80"}'
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

        is_answered(
            &directory,
            "beyond",
            "403",
            "0.0.0.0 is not an address of loopback, where alone a VM may open a port",
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
        let yes = granted
            .iter()
            .find(|grant| grant["action"] == "ACTION_ALLOW")
            .unwrap();
        world.vnetctl(&["grants", "revoke", &id(yes)]);
        assert_ne!(fetch(world, "127.0.0.1:8080").code, 0, "closed with its grant");
        assert_eq!(world.list(&["forward", "list"]).len(), 1, "SSH's alone is left");
    });
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
