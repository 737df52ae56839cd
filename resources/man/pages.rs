//! Manual pages out of a command line: one for the program, and one for each subcommand. Tests of the programs have this file
//! as a module.

use std::collections::BTreeMap;
use std::path::Path;

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

/// What clap_mangen writes before each section: once is enough.
const PREAMBLE: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";
const PROGRAMS: [&str; 3] = ["rackctl", "rackvisor", "rackvisor-jailer"];

/// Holds the pages of `program` against those in `resources/man`, or makes those anew if UPDATE_MAN is set.
pub fn check(program: Command) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/man").join(program.get_name());
    let pages = pages(program);
    if std::env::var_os("UPDATE_MAN").is_some() {
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        pages.iter().for_each(|(name, page)| std::fs::write(folder.join(name), page).unwrap());
    }
    let files = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path());
    let found = files.map(|path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        (name, std::fs::read_to_string(path).unwrap())
    });
    let found: BTreeMap<String, String> = found.collect();
    let names = |pages: &BTreeMap<String, String>| pages.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&pages), "pages of {}: make man", folder.display());
    for (name, page) in pages {
        assert!(found.get(&name) == Some(&page), "{}/{name} is stale: make man", folder.display());
    }
}

/// The pages by the names of their files.
fn pages(program: Command) -> BTreeMap<String, String> {
    let mut program = program.disable_help_subcommand(true);
    program.build();
    let mut pages = BTreeMap::new();
    add(&program, &program, None, &mut pages);
    pages
}

fn add(command: &Command, program: &Command, above: Option<&str>, pages: &mut BTreeMap<String, String>) {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    for below in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        add(below, program, Some(name), pages);
    }
    pages.insert(format!("{name}.1"), page(command, name, program, above));
}

fn page(command: &Command, name: &str, program: &Command, above: Option<&str>) -> String {
    let man = Man::new(command.clone());
    let version = program.get_version().unwrap_or_default();
    // Not clap_mangen's, which leaves the empty date out, so that all behind it would move up.
    let mut page =
        format!(".TH \"{name}\" \"1\" \"\" \"{} {version}\" \"Rackvisor\"\n", program.get_name()).into_bytes();
    man.render_name_section(&mut page).unwrap();
    man.render_synopsis_section(&mut page).unwrap();
    man.render_description_section(&mut page).unwrap();
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        man.render_options_section(&mut page).unwrap();
    }
    if command.get_subcommands().any(|command| !command.is_hide_set()) {
        man.render_subcommands_section(&mut page).unwrap();
    }
    let mut roff = Roff::new();
    let after = program.get_after_help().expect("the help of a program ends with its exit codes").to_string();
    after.split("\n\n").for_each(|paragraph| add_paragraph(&mut roff, paragraph, above.is_none()));
    roff.control("SH", ["SEE ALSO"]);
    let others = PROGRAMS.iter().copied().filter(|other| *other != name && Some(*other) != above);
    let see: Vec<String> = above.into_iter().chain(others).map(|page| format!("{page}(1)")).collect();
    roff.text([roman(see.join(", "))]);
    roff.to_writer(&mut page).unwrap();
    PREAMBLE.to_owned() + &String::from_utf8(page).unwrap().replace(PREAMBLE, "")
}

/// What the help of the program ends with. Of that, exit codes are for subcommands too.
fn add_paragraph(roff: &mut Roff, paragraph: &str, whole: bool) {
    let (title, rest) = paragraph.split_once('\n').unwrap_or((paragraph, ""));
    match title {
        "Exit codes:" => {
            roff.control("SH", ["EXIT STATUS"]);
            for line in rest.lines() {
                let (code, meaning) = line.trim().split_once("  ").expect("a code and what it means");
                roff.control("TP", []).text([bold(code)]).text([roman(meaning.trim())]);
            }
        }
        "Example:" | "Examples:" if whole => {
            roff.control("SH", ["EXAMPLES"]).control("nf", []);
            rest.lines().for_each(|line| {
                roff.text([roman(line)]);
            });
            roff.control("fi", []);
        }
        _ if whole => {
            roff.control("SH", ["NOTES"]).text([roman(paragraph)]);
        }
        _ => {}
    }
}
