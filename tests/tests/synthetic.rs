//! Synthetic answers with a real guest: one question for a name and port, and not a byte of DNS before the yes.
#![cfg(target_os = "linux")]

use std::time::Duration;

use vnet_tests::{Answer, Dns, World, eventually, http, staged, staged_with, udp_echo};
use vnetctl::sandbox::stage::StageSpec;

const ASKING: &str = "version: 1\nmode: ask\ndns:\n  answer: synthetic\n";

fn dns(world: &World) -> Dns {
    Dns::serve(
        world.internet(),
        "203.0.113.10:53",
        &[
            ("web.example.com", Answer::A("203.0.113.10")),
            ("other.example.com", Answer::A("203.0.113.10")),
            ("away.example.com", Answer::A("198.51.100.7")),
            ("rebind.example.com", Answer::A("127.0.0.1")),
            ("inside.example.com", Answer::A("10.20.30.40")),
        ],
    )
}

fn flags(file: &std::path::Path) -> [&str; 4] {
    ["--vm", "web", "--network-policy", file.to_str().unwrap()]
}

#[test]
fn one_question_opens_a_name_and_nothing_is_looked_up_before_the_yes() {
    staged(
        one_question_opens_a_name_and_nothing_is_looked_up_before_the_yes,
        |world| {
            let web = http(world.internet(), "203.0.113.10:80");
            let dns = dns(world);
            let file = world.file("policy.yaml", ASKING);
            let mut run = world.run(&flags(&file), &["curl", "-sS", "http://web.example.com/story"]);
            let id = world.first_pending_id();
            let asked = run.complains(&id);
            assert!(
                asked.contains("web asks for domain web.example.com:80"),
                "{asked}"
            );
            assert!(!asked.contains("guarded"), "{asked}");
            assert_eq!(dns.asked(), Vec::<String>::new(), "nothing leaves before the yes");
            let said = world.vnetctl(&["approve", "--matching", "*.example.com", "--vm", "web"]);
            assert!(!said.contains("left out"), "{said}");
            assert!(said.contains("allow domain web.example.com:80 for web"), "{said}");
            let ended = run.wait();
            assert_eq!(
                (ended.code, ended.stdout.as_str()),
                (0, "this is 203.0.113.10:80 at /story\n"),
                "{ended:?}"
            );
            assert_eq!(
                ended.stderr.matches("asks for").count(),
                1,
                "one question: {ended:?}"
            );
            assert!(
                dns.asked().iter().all(|q| q.ends_with(" web.example.com")),
                "{:?}",
                dns.asked()
            );
            assert_eq!(web.connections(), 1);
            world.is_clean();
        },
    );
}

#[test]
fn a_name_has_a_synthetic_ipv6_address_that_leads_to_its_real_one_after_the_yes() {
    let nets = |texts: &[&str]| texts.iter().map(|net| net.parse().unwrap()).collect();
    let spec = StageSpec {
        host: nets(&["203.0.113.1/24", "2001:db8:1::1/64"]),
        internet: nets(&["203.0.113.10/24", "2001:db8:1::10/64"]),
        resolv_conf: Some("nameserver 203.0.113.10\n".to_owned()),
        ..StageSpec::default()
    };
    staged_with(
        a_name_has_a_synthetic_ipv6_address_that_leads_to_its_real_one_after_the_yes,
        &spec,
        |world| {
            let web = http(world.internet(), "[2001:db8:1::10]:80");
            let six = [("six.example.com", Answer::Aaaa("2001:db8:1::10"))];
            let dns = Dns::serve(world.internet(), "203.0.113.10:53", &six);
            let file = world.file("policy.yaml", ASKING);
            let script = "getent ahostsv6 six.example.com | head -n 1 | cut -d ' ' -f 1
                curl -6 -sS http://six.example.com/story; curl -6 -sS http://other.example.com/; echo $?";
            let mut run = world.run(&flags(&file), &["sh", "-c", script]);
            let first = world.first_pending_id();
            let told = run.prints("\n");
            assert!(told.starts_with("fd73:796e:7468::"), "{told}");
            let asked = run.complains(&first);
            assert!(
                asked.contains("web asks for domain six.example.com:80"),
                "{asked}"
            );
            assert_eq!(dns.asked(), Vec::<String>::new(), "nothing leaves before the yes");
            world.vnetctl(&["approve", &first]);
            let mut second = String::new();
            eventually("the other name is asked about", || {
                let waiting = world.pending();
                second = waiting
                    .iter()
                    .map(vnet_tests::id)
                    .find(|id| *id != first)
                    .unwrap_or_default();
                !second.is_empty()
            });
            world.vnetctl(&["deny", &second]);
            let ended = run.wait();
            let met = ended.stdout.lines().skip(1).collect::<Vec<_>>();
            assert_eq!(met, ["this is [2001:db8:1::10]:80 at /story", "7"], "{ended:?}");
            assert_eq!((web.connections(), dns.asked_for("other.example.com")), (1, 0));
        },
    );
}

#[test]
fn names_that_share_an_address_are_asked_about_apart() {
    staged(names_that_share_an_address_are_asked_about_apart, |world| {
        let web = http(world.internet(), "203.0.113.10:80");
        let dns = dns(world);
        let file = world.file(
            "policy.yaml",
            &format!("{ASKING}rules:\n  - {{action: allow, domains: [web.example.com], ports: [80]}}\n"),
        );
        let run = world.run(
            &flags(&file),
            &[
                "sh",
                "-c",
                "curl -sS http://web.example.com/; curl -sS http://other.example.com/; echo $?",
            ],
        );
        world.vnetctl(&["deny", &world.first_pending_id()]);
        let ended = run.wait();
        assert_eq!(ended.stdout, "this is 203.0.113.10:80 at /\n7\n", "{ended:?}");
        assert_eq!(web.connections(), 1);
        assert_eq!(dns.asked_for("other.example.com"), 0);
    });
}

#[test]
fn what_a_name_stands_for_is_judged_before_it_is_dialled() {
    staged(what_a_name_stands_for_is_judged_before_it_is_dialled, |world| {
        let away = http(world.internet(), "198.51.100.7:80");
        let _dns = dns(world);
        let file = world.file(
            "policy.yaml",
            "version: 1\ndns: {answer: synthetic}\nrules:\n  - {name: no-away, action: deny, cidr: 198.51.100.0/24}\n  \
             - {action: allow, domains: ['*.example.com']}\n",
        );
        let ended = world.script(
            &flags(&file),
            "for n in away rebind inside; do curl -sS -m 20 http://$n.example.com/ 2>&1 >/dev/null | grep -c connect; done",
        );
        assert_eq!(ended.stdout, "1\n1\n1\n", "{ended:?}");
        assert_eq!(away.connections(), 0);
        eventually("the denials are in the history", || {
            let events = world.vnetctl(&["events", "list", "--vm", "web"]);
            events.contains("away.example.com stands for 198.51.100.7")
                && events.contains("inside.example.com stands for 10.20.30.40")
        });
    });
}

#[test]
fn a_revoked_yes_cuts_the_connection_and_datagrams_go_both_ways() {
    staged(
        a_revoked_yes_cuts_the_connection_and_datagrams_go_both_ways,
        |world| {
            let _web = http(world.internet(), "203.0.113.10:80");
            let datagrams = udp_echo(world.internet(), "203.0.113.10:9999");
            let _dns = dns(world);
            let file = world.file(
            "policy.yaml",
            &format!(
                "{ASKING}rules:\n  - {{action: allow, domains: [other.example.com], ports: [9999], protocol: udp}}\n"
            ),
        );
            let mut run = world.run(
            &flags(&file),
            &[
                "sh",
                "-c",
                "echo x | timeout 5 socat -t2 - udp:other.example.com:9999; exec curl -sSN http://web.example.com/drip",
            ],
        );
            let id = world.first_pending_id();
            world.vnetctl(&["approve", &id]);
            run.prints("...");
            assert_eq!(datagrams.requests(), 1);
            let grants = world.list(&["grants", "list"]);
            let grant = grants[0]["id"].as_str().unwrap().to_owned();
            let before = std::time::Instant::now();
            world.vnetctl(&["grants", "revoke", &grant]);
            let ended = run.wait();
            assert_ne!(ended.code, 0, "{ended:?}");
            assert!(
                before.elapsed() < Duration::from_secs(4),
                "{:?}",
                before.elapsed()
            );
        },
    );
}
