//! Questions at the terminal of `vnetctl run`: only the person who looks at them answers them, whatever the
//! command writes, and whatever it has the terminal send.
#![cfg(target_os = "linux")]

use std::thread;
use std::time::Duration;

use vnet_tests::{Person, World, http, staged};
use vnetctl::terminal::GRACE;

const SERVER: &str = "http://203.0.113.10/";

/// Longer than a prompt takes no answer.
fn wait_out_grace() {
    thread::sleep(GRACE + Duration::from_millis(200));
}

/// A command at a terminal of 24 rows and 80 columns.
fn at_terminal(world: &World, script: &str) -> Person {
    let mut command = world.command(&["run", "--secure-mode", "--vm", "web", "--", "sh", "-c", script]);
    command.env("TERM", "xterm");
    Person::start_sized(&command, 24, 80)
}

/// What vnet's own lines begin with, as the first of them says.
fn mark(person: &mut Person) -> String {
    let seen = person.sees("vnet: its own lines begin with [");
    let at = seen.find('[').expect("it is there");
    seen[at..].chars().take_while(|c| *c != ' ').collect()
}

#[test]
fn first_line_says_what_is_not_filtered() {
    staged(first_line_says_what_is_not_filtered, |world| {
        let mut person = at_terminal(world, "stty size");
        let mark = mark(&mut person);
        let (code, screen) = person.leaves();
        assert_eq!(code, Some(0), "{screen}");
        assert!(
            screen.starts_with(&format!(
                "{mark} vnet: its own lines begin with {mark}; not filtered: your files;"
            )),
            "{screen}"
        );
        // One row is vnet's, should a program take the whole screen.
        assert!(screen.contains("23 80"), "{screen}");
    });
}

#[test]
fn what_the_command_has_its_terminal_send_answers_nothing() {
    staged(what_the_command_has_its_terminal_send_answers_nothing, |world| {
        let server = http(world.internet(), "203.0.113.10:80");
        let program = world.file(
            "push.py",
            r#"
import ctypes, fcntl, os, subprocess, sys, time
curl = subprocess.Popen(["curl", "-sS", "http://203.0.113.10/"])
time.sleep(1)
for n in range(20):
    for name in ("/dev/tty", "/proc/self/fd/0", "/proc/self/fd/1", "/dev/console", "/dev/tty0", "/dev/tty1"):
        try:
            tty = os.open(name, os.O_RDWR | os.O_NOCTTY)
        except OSError:
            continue
        for number, argument in ((0x5412, b"y"), (0x5412, b"\n"), (0x541c, b"\x03"), (0x541c, b"\x02" + bytes(10))):
            try:
                fcntl.ioctl(tty, number, argument)
            except OSError:
                pass
        os.write(tty, b"y\r\n\x05\x1b]2;y\x07\x1b[21t\x1b[5n")
        os.close(tty)
    time.sleep(0.05)
print("pushed")
curl.kill()
"#,
        );
        let mut person = at_terminal(world, &format!("exec python3 {}", program.display()));
        person.sees("asks for");
        let (_, screen) = person.leaves();
        assert!(screen.contains("pushed"), "{screen}");
        assert!(
            !screen.contains('\x05') && !screen.contains("\x1b[21t"),
            "{screen}"
        );
        assert_eq!(server.connections(), 0, "{screen}");
    });
}

#[test]
fn only_a_key_alone_and_after_half_a_second_answers() {
    staged(only_a_key_alone_and_after_half_a_second_answers, |world| {
        let server = http(world.internet(), "203.0.113.10:80");
        let script = format!("echo up; sleep 0.5; curl -sS {SERVER}; echo code $?; cat -A");
        let mut person = at_terminal(world, &script);
        person.sees("up\r\n");
        // Typed ahead, and at once.
        person.types("y");
        person.sees("? ");
        person.types("y");
        thread::sleep(Duration::from_millis(100));
        person.types("y");
        wait_out_grace();
        // Return alone, what was pasted, and what a terminal answers, cut in two.
        for bytes in [
            "\r",
            "yes",
            "y\r",
            "yy",
            "\x1b[200~y",
            "\x1b[201~",
            "\x1b]lyyy",
            "y",
            "\x1b\\",
            "\x1b[M y",
            "y",
            "\x1b",
            "y",
            "\x1b[3;4",
            "R",
        ] {
            person.types(bytes);
            thread::sleep(Duration::from_millis(60));
            // Return has it asked again, and that takes its time.
            if bytes == "\r" {
                wait_out_grace();
            }
        }
        wait_out_grace();
        assert_eq!(server.connections(), 0);
        person.types("o");
        person.sees("code 0\r\n");
        assert_eq!(server.connections(), 1);
        // Of all that the command has what the terminal answered to it, and nothing else.
        person.types("\x04");
        person.types("\x04");
        let (_, screen) = person.leaves();
        assert!(!screen.contains("yes"), "{screen}");
        for answer in ["^[]lyyyy^[\\", "^[[3;4R"] {
            assert!(screen.contains(answer), "{answer:?}: {screen}");
        }
    });
}

#[test]
fn command_cannot_learn_what_marks_a_question() {
    staged(command_cannot_learn_what_marks_a_question, |world| {
        http(world.internet(), "203.0.113.10:80");
        let script = format!(
            "env; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n'; \
             printf '\\033[1;1;1;1;24;80*y\\033P$qm\\033\\\\\\033[?1$p\\033]52;c;?\\007'; \
             printf '[aaaa] vnet: web asks for nothing; [y]es? '; curl -sS {SERVER}"
        );
        let mut person = at_terminal(world, &script);
        let mark = mark(&mut person);
        person.sees("asks for tcp 203.0.113.10:80");
        wait_out_grace();
        person.types("n");
        let (_, screen) = person.leaves();
        let question = format!("{mark} vnet: web asks for tcp 203.0.113.10:80");
        assert!(screen.contains(&question), "{screen}");
        // Where vnet itself has written it, and nowhere else.
        let own = screen.matches(&format!("{mark} vnet: ")).count();
        let announced = format!("begin with {mark};");
        assert_eq!(
            screen.matches(&mark).count(),
            own + screen.matches(&announced).count(),
            "{screen}"
        );
        for query in ["\x1b[1;1;1;1", "\x1bP", "\x1b[?1$", "\x1b]52;"] {
            assert!(!screen.contains(query), "{query:?}: {screen}");
        }
    });
}

#[test]
fn under_a_program_with_the_whole_screen_a_key_opens_the_question() {
    staged(
        under_a_program_with_the_whole_screen_a_key_opens_the_question,
        |world| {
            let server = http(world.internet(), "203.0.113.10:80");
            let lines: String = (1..200).map(|n| format!("line {n}\n")).collect();
            let file = world.file("text", &lines);
            let script = format!(
                "(sleep 0.5; curl -sS {SERVER} > fetched) & less {}; wait; cat fetched; echo code $?",
                file.display()
            );
            let mut person = at_terminal(world, &script);
            let mark = mark(&mut person);
            person.sees("line 22");
            // Nothing is laid over the program: the last row says what is asked.
            person.sees(&format!(
                "\x1b[24;1H\x1b[0m\x1b[2K\x1b[7m{mark} Ctrl-] answers: vnet: web asks for tcp 203"
            ));
            // Keys are the program's.
            wait_out_grace();
            person.types("y");
            person.types("G");
            person.sees("(END)");
            person.types("g");
            assert_eq!(server.connections(), 0);
            assert_eq!(world.pending().len(), 1);

            person.types("\x1d");
            person.sees("[y]es until it");
            // Too early.
            person.types("y");
            wait_out_grace();
            // The key that opens it leaves it for later, too.
            // Keys that come together are none to a question, so it must be off the screen first.
            person.forgets();
            person.types("\x1d");
            person.sees(&format!("{mark} Ctrl-] answers"));
            person.types("G");
            wait_out_grace();
            assert_eq!(server.connections(), 0);
            person.forgets();
            person.types("\x1d");
            person.sees("[y]es until it");
            wait_out_grace();
            person.types("y");
            vnet_tests::eventually("it is allowed", || server.connections() == 1);
            wait_out_grace();
            person.types("q");
            person.sees("code 0\r\n");
            let (code, screen) = person.leaves();
            assert_eq!(code, Some(0), "{screen}");
            assert!(screen.contains("this is 203.0.113.10:80 at /"), "{screen}");
        },
    );
}
